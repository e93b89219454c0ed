"""What loading an adapter did: what was applied to each module, with which numbers and implementation, how fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from polyaccel.lora.numbers import RankNumbers
from polyaccel.lora.target import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptEntry:
    """One module of the adapter at one place of the model, or a tensor that was dropped (``site`` empty).

    ``reason`` says why it was dropped, or remarks on an applied one; ``nbytes`` are bytes in the file.
    """

    module: str
    applied: bool
    reason: str = ""
    site: str = ""
    slice: int = 0
    expert: int | None = None
    layer: int | None = None
    kind: Kind = "linear"
    numbers: RankNumbers | None = None
    nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """Wall time of a load's stages, in seconds: headers and matching, packing, copy to the device, all of it."""

    read: float = 0.0
    pack: float = 0.0
    copy: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReceipt:
    """The record of one load.

    ``generation`` is the load's own number, never used twice. ``file_bytes`` counts the matrices in the file,
    ``packed_bytes`` the buffer that went to one device. ``implementations`` maps a site to the implementation its plan
    names for steps with adapters.
    """

    name: str
    path: str
    generation: int
    entries: tuple[ReceiptEntry, ...]
    notes: tuple[str, ...] = ()
    file_bytes: int = 0
    packed_bytes: int = 0
    seconds: StageSeconds = StageSeconds()
    implementations: Mapping[str, str] = field(default_factory=dict)

    @property
    def applied(self) -> tuple[ReceiptEntry, ...]:
        """Entries that change the model's output."""
        return tuple(entry for entry in self.entries if entry.applied)

    @property
    def dropped(self) -> tuple[ReceiptEntry, ...]:
        """Entries that were not applied, each with its reason."""
        return tuple(entry for entry in self.entries if not entry.applied)

    @property
    def max_rank(self) -> int:
        """Largest true rank applied; 0 where nothing is."""
        return max((entry.numbers.true_rank for entry in self.applied if entry.numbers), default=0)

    def with_implementations(self, implementations: Mapping[str, str]) -> AdapterReceipt:
        """The same receipt with the plan's answer a site."""
        return replace(self, implementations=dict(implementations))

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "path": self.path,
            "generation": self.generation,
            "file_bytes": self.file_bytes,
            "packed_bytes": self.packed_bytes,
            "seconds": {stage: getattr(self.seconds, stage) for stage in ("read", "pack", "copy", "total")},
            "notes": list(self.notes),
            "implementations": dict(self.implementations),
            "modules": [_entry_dict(entry) for entry in self.entries],
        }

    def __str__(self) -> str:
        seconds = self.seconds
        lines = [
            f"adapter {self.name!r} (load {self.generation}) from {self.path}: {len(self.applied)} modules applied, "
            f"{len(self.dropped)} dropped",
            f"  {self.file_bytes / 1e6:.2f} MB in the file, {self.packed_bytes / 1e6:.2f} MB packed; "
            f"read {seconds.read * 1e3:.1f} ms, pack {seconds.pack * 1e3:.1f} ms, copy {seconds.copy * 1e3:.1f} ms, "
            f"total {seconds.total * 1e3:.1f} ms",
        ]
        rows = [_HEADINGS, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
        lines += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(line.rstrip() for line in lines)

    def _rows(self) -> list[tuple[str, ...]]:
        """One line for all layers and experts of a module that share their numbers and their fate."""
        groups: dict[tuple[str, ...], tuple[set[int], int]] = {}
        for entry in self.entries:
            numbers = entry.numbers
            key = (
                _generic(entry),
                f"{numbers.alpha:g}" if numbers else "",
                f"{numbers.true_rank}/{numbers.padded_rank}/{numbers.shard_rank}" if numbers else "",
                f"{numbers.scale:.6g}" if numbers else "",
                "applied" if entry.applied else "dropped",
                self.implementations.get(entry.site, ""),
                entry.reason,
            )
            layers, count = groups.get(key, (set(), 0))
            groups[key] = (layers | ({entry.layer} if entry.layer is not None else set()), count + 1)
        return [(key[0], _spans(layers), str(count), *key[1:]) for key, (layers, count) in groups.items()]


_HEADINGS = (
    "module",
    "layers",
    "count",
    "alpha",
    "rank true/padded/shard",
    "scale",
    "state",
    "implementation",
    "reason",
)


def _generic(entry: ReceiptEntry) -> str:
    parts = entry.module.split(".")
    numbers = {str(value) for value in (entry.layer, entry.expert) if value is not None}
    return ".".join("*" if part in numbers else part for part in parts)


def _spans(layers: set[int]) -> str:
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _entry_dict(entry: ReceiptEntry) -> dict[str, object]:
    numbers = entry.numbers
    return {
        "module": entry.module,
        "applied": entry.applied,
        "reason": entry.reason,
        "site": entry.site,
        "slice": entry.slice,
        "expert": entry.expert,
        "layer": entry.layer,
        "kind": entry.kind,
        "bytes": entry.nbytes,
        "alpha": numbers.alpha if numbers else None,
        "true_rank": numbers.true_rank if numbers else None,
        "padded_rank": numbers.padded_rank if numbers else None,
        "shard_rank": numbers.shard_rank if numbers else None,
        "scale": numbers.scale if numbers else None,
    }
