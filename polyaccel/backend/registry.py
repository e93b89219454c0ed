"""Finding backends: which are installed, which can be used, and loading the one chosen.

Discovery reads distribution metadata only. The API range is checked before anything of a plugin is imported, and a
plugin that was not chosen is never imported. Listing uses importlib.metadata because stevedore loses the distribution
of an entry point and keeps a cache on disk that can be minutes old; the one chosen is loaded by stevedore's
``DriverManager``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from polyaccel.backend.backend import Availability, Backend
from polyaccel.backend.errors import BackendUnavailable
from polyaccel.backend.version import API_GROUP, API_VERSION, BACKENDS_GROUP, ApiRange, format_version

INSTEAD = 'To run without it, pass backend="cpu".'


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledBackend:
    """One entry point, as its distribution's metadata states it. Nothing has been imported."""

    name: str
    target: str
    distribution: str
    version: str
    api: str | None

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version} ({self.target})"

    def api_refusal(self) -> str | None:
        """Why the contract's version does not suit, with the line that fixes it; None if it does."""
        here = format_version(API_VERSION)
        exact = f"v{here.replace('.', '_')}"
        line = f'[project.entry-points."{API_GROUP}"] {self.name} = "{exact}:{exact}"'
        if self.api is None:
            return f"{self.origin} states no API range; its pyproject.toml needs: {line}"
        try:
            accepted = ApiRange.parse(self.api).accepts(API_VERSION)
        except ValueError as error:
            return f"{self.origin}: {error}; its pyproject.toml needs: {line}"
        if not accepted:
            return f"{self.origin} works with API {self.api}, this is API {here}; install a matching version"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    """A row of ``polyaccel backends``."""

    name: str
    origin: str
    usable: bool
    reason: str
    devices: tuple[str, ...] = ()


def installed() -> list[InstalledBackend]:
    """Every installed backend, by name.

    Raises:
        BackendUnavailable: two distributions register the same name; it lists both.
    """
    return [_only(claims) for claims in _by_name().values()]


def load(name: str) -> Backend:
    """Construct the backend called ``name``, importing only it.

    Raises:
        BackendUnavailable: not installed, registered twice, wrong API range, or its import or constructor raised; names
            distribution, entry point and cause.
    """
    known = _by_name()
    if name not in known:
        raise BackendUnavailable(f"no backend {name!r} is installed; installed are {list(known)}")
    return _construct(_only(known[name]))


def choose(name: str = "auto") -> Backend:
    """``load(name)`` and check that it is usable here; ``auto`` picks the usable backend of highest priority.

    Raises:
        BackendUnavailable: not usable, with the reason. For ``auto`` also when a backend's hardware is present but the
            backend cannot be used, or an installed plugin is broken: starting on the CPU instead would be a silent
            fallback.
    """
    if name != "auto":
        backend = load(name)
        availability = _probe(backend)
        if not availability.usable:
            raise BackendUnavailable(f"backend {name!r} cannot be used here: {availability.reason}")
        return backend
    candidates = [backend for backend in map(_construct, installed()) if backend.priority is not None]
    candidates.sort(key=lambda backend: (-(backend.priority or 0), backend.name))
    for backend in candidates:
        availability = _probe(backend)
        if availability.usable:
            return backend
        if availability.hardware:
            raise BackendUnavailable(
                f"the hardware of backend {backend.name!r} is present but cannot be used: {availability.reason}. "
                f"{INSTEAD}"
            )
    raise BackendUnavailable(f"no usable backend among {[backend.name for backend in candidates]}")


def list_backends() -> list[BackendStatus]:
    """Every installed backend with PASS or the reason why not; never raises for a broken one."""
    rows: list[BackendStatus] = []
    for claims in _by_name().values():
        try:
            availability = _probe(_construct(_only(claims)))
        except BackendUnavailable as error:
            availability = Availability(usable=False, reason=str(error))
        rows += [
            BackendStatus(
                name=claim.name,
                origin=claim.origin,
                usable=availability.usable,
                reason=availability.reason,
                devices=availability.devices,
            )
            for claim in claims
        ]
    return rows


def _by_name() -> dict[str, list[InstalledBackend]]:
    """What is registered under each name, names in order: several where distributions collide."""
    ranges = {(e.name, _distribution(e)[0]): e.value for e in metadata.entry_points(group=API_GROUP)}
    found: dict[str, list[InstalledBackend]] = {}
    for entry in metadata.entry_points(group=BACKENDS_GROUP):
        distribution, version = _distribution(entry)
        backend = InstalledBackend(
            name=entry.name,
            target=entry.value,
            distribution=distribution,
            version=version,
            api=ranges.get((entry.name, distribution)),
        )
        claims = found.setdefault(entry.name, [])
        if backend not in claims:
            claims.append(backend)
    return {name: sorted(found[name], key=lambda claim: claim.origin) for name in sorted(found)}


def _only(claims: list[InstalledBackend]) -> InstalledBackend:
    if len(claims) > 1:
        origins = " and ".join(claim.origin for claim in claims)
        raise BackendUnavailable(
            f"{len(claims)} distributions register backend {claims[0].name!r}: {origins}; uninstall all but one"
        )
    return claims[0]


def _probe(backend: Backend) -> Availability:
    try:
        return backend.probe()
    except Exception as error:
        raise BackendUnavailable(
            f"backend {backend.name!r} is broken: its probe raised {type(error).__name__}: {error}. {INSTEAD}"
        ) from error


def _distribution(entry: metadata.EntryPoint) -> tuple[str, str]:
    distribution = entry.dist
    return ("unknown distribution", "?") if distribution is None else (distribution.name, distribution.version)


def _construct(entry: InstalledBackend) -> Backend:
    refusal = entry.api_refusal()
    if refusal is not None:
        raise BackendUnavailable(f"backend {entry.name!r} is refused: {refusal}")
    try:
        factory = _factory(entry)
        backend = factory()
    except Exception as error:
        raise BackendUnavailable(
            f"backend {entry.name!r} of {entry.origin} is broken: {type(error).__name__}: {error}. {INSTEAD}"
        ) from error
    if not isinstance(backend, Backend):
        raise BackendUnavailable(
            f"backend {entry.name!r} of {entry.origin} is a {type(backend).__name__}, not a Backend"
        )
    backend.name = entry.name
    return backend


def _factory(entry: InstalledBackend) -> Callable[[], object]:
    from stevedore.driver import DriverManager
    from stevedore.extension import ExtensionManager

    # stevedore's cache on disk can serve entry points of a distribution that was replaced within the last two minutes
    # (the key's time stamp is a float32). The metadata is the truth: where the two differ stevedore is not used.
    listed = ExtensionManager.make_test_instance([], namespace=BACKENDS_GROUP).list_entry_points()
    if [found.value for found in listed if found.name == entry.name] == [entry.target]:
        plugin: object = DriverManager(BACKENDS_GROUP, entry.name, on_load_failure_callback=_raise).driver
    else:
        plugin = metadata.EntryPoint(name=entry.name, value=entry.target, group=BACKENDS_GROUP).load()
    if not callable(plugin):
        raise TypeError(
            f"entry point {entry.name!r} is {plugin!r}; expected a Backend class or a function that returns one"
        )
    return plugin


def _raise(manager: object, entry: object, error: BaseException) -> None:
    raise error
