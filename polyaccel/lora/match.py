"""Which module of the model each adapter matrix belongs to.

Nothing is passed over in silence: a tensor without a place, a shape of another model, values that are not finite and an
adapter that changes nothing are errors unless the caller allows them, and what was dropped is in the receipt.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from polyaccel.backend.errors import AdapterIncompatible
from polyaccel.lora.adapter_file import AdapterFile, LoraPair
from polyaccel.lora.receipt import ReceiptEntry
from polyaccel.lora.target import AdapterTarget
from polyaccel.lora.values import largest_magnitude

_SHOWN = 8
_EXPERT_LEAVES = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
_MOE_PARENTS = (".mlp.", ".block_sparse_moe.")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatchedAdapter:
    """An adapter's pairs beside the targets they fill, in the order of the targets, and the receipt's lines."""

    pairs: tuple[tuple[AdapterTarget, LoraPair], ...]
    entries: tuple[ReceiptEntry, ...]
    notes: tuple[str, ...]

    @property
    def max_rank(self) -> int:
        """Largest true rank; the same on every rank of the world."""
        return max((pair.numbers.true_rank for _, pair in self.pairs), default=0)


def match_adapter(
    file: AdapterFile,
    targets: Sequence[AdapterTarget],
    *,
    allow_unmatched: bool = False,
    allow_no_effect: bool = False,
) -> MatchedAdapter:
    """Find each pair's targets by module name and check shapes and values.

    Names saved from a model without its ``model.`` wrapper, and the names that expert modules have had over time
    (``block_sparse_moe.experts.0.w1``, ``mlp.experts.0.gate_proj``), are tried as well.

    Raises:
        AdapterIncompatible: tensors without a place (unless ``allow_unmatched``), shapes of another model, values
            that are not finite, or an adapter whose every delta is zero (unless ``allow_no_effect``).
    """
    by_module: dict[str, list[AdapterTarget]] = {}
    for target in targets:
        by_module.setdefault(target.module, []).append(target)
    experts = _expert_counts(targets)
    chosen: dict[str, LoraPair] = {}
    unmatched: list[str] = []
    for name, pair in file.pairs.items():
        module = next((candidate for candidate in _candidates(name) if candidate in by_module), None)
        if module is None:
            unmatched.append(name)
            continue
        if module in chosen:
            raise AdapterIncompatible(f"{file.path}: {chosen[module].module!r} and {name!r} both adapt {module!r}")
        for target in by_module[module]:
            _check_shape(file, target, pair, experts)
        chosen[module] = pair
    _check_copies(file, by_module)
    if (unmatched or file.unknown) and not allow_unmatched:
        raise AdapterIncompatible(_unmatched_message(file, unmatched, list(by_module)))
    effects = {module: _effect(pair) for module, pair in chosen.items()}
    if not any(effects.values()) and not allow_no_effect:
        why = "every B or A is zero, or the scale is" if chosen else "none of its tensors has a place in this model"
        raise AdapterIncompatible(f"{file.path}: the adapter has no effect: {why}; was it trained and saved properly?")
    pairs: list[tuple[AdapterTarget, LoraPair]] = []
    entries: list[ReceiptEntry] = []
    for target in targets:
        found = chosen.get(target.module)
        if found is not None:
            pairs.append((target, found))
            entries.append(_applied(target, found, effects[target.module]))
    entries += [_dropped(name, "the model has no such module", file.pairs[name]) for name in unmatched]
    entries += [_dropped(name, "not a LoRA matrix", None) for name in file.unknown]
    copies = tuple(
        f"{module}: the file also holds its base weight, taken to equal the model's; not read"
        for module, _ in file.base_copies
    )
    return MatchedAdapter(pairs=tuple(pairs), entries=tuple(entries), notes=file.notes + copies)


def _candidates(name: str) -> Iterator[str]:
    for prefixed in (name, f"model.{name}"):
        yield prefixed
        here, there = _MOE_PARENTS if _MOE_PARENTS[0] in prefixed else _MOE_PARENTS[::-1]
        for moved in (prefixed, prefixed.replace(here, there)):
            if moved != prefixed:
                yield moved
            if ".experts." not in moved:
                continue
            parent, _, leaf = moved.rpartition(".")
            for pair in _EXPERT_LEAVES:
                if leaf in pair:
                    yield f"{parent}.{pair[1 - pair.index(leaf)]}"


def _container(module: str) -> str:
    return module.partition(".experts.")[0]


def _expert_counts(targets: Sequence[AdapterTarget]) -> dict[str, int]:
    seen: dict[str, set[int]] = {}
    for target in targets:
        if target.expert is not None:
            seen.setdefault(_container(target.module), set()).add(target.expert)
    return {container: len(numbers) for container, numbers in seen.items()}


def _check_shape(file: AdapterFile, target: AdapterTarget, pair: LoraPair, experts: dict[str, int]) -> None:
    where = f"{file.path}: module {target.module!r}"
    if pair.kind != target.kind:
        raise AdapterIncompatible(
            f"{where}: the adapter was saved for an {pair.kind} module but the model has a {target.kind} module there"
        )
    if (pair.out_features, pair.in_features) != (target.out_features, target.in_features):
        raise AdapterIncompatible(
            f"{where}: the adapter is for a weight of [{pair.out_features}, {pair.in_features}] but the model's is "
            f"[{target.out_features}, {target.in_features}]; was it made for another model?"
        )
    if pair.experts is not None and pair.experts != experts.get(_container(target.module)):
        raise AdapterIncompatible(
            f"{where}: the adapter is for {pair.experts} experts but the model has "
            f"{experts.get(_container(target.module), 0)}; was it made for another model?"
        )


def _check_copies(file: AdapterFile, by_module: dict[str, list[AdapterTarget]]) -> None:
    for module, shape in file.base_copies:
        target = next((by_module[name][0] for name in _candidates(module) if name in by_module), None)
        if target is None:
            continue
        sides = (target.out_features, target.in_features)
        expected = sides[::-1] if target.kind == "embedding" else sides
        if shape != expected:
            raise AdapterIncompatible(
                f"{file.path}: the base weight saved for {module!r} is {list(shape)}, the model's {list(expected)}; "
                "the adapter was trained with a resized vocabulary, which is not supported"
            )


def _unmatched_message(file: AdapterFile, unmatched: Sequence[str], modules: Sequence[str]) -> str:
    lines = [f"{file.path}: {len(unmatched) + len(file.unknown)} modules or tensors have no place in this model:"]
    for name in unmatched[:_SHOWN]:
        close = difflib.get_close_matches(name, modules, n=1, cutoff=0.6)
        lines.append(f"  {name}" + (f" (close: {close[0]})" if close else ""))
    lines += [f"  {name:.200} (not a LoRA matrix; modules_to_save leaves such)" for name in file.unknown[:_SHOWN]]
    shown = min(len(unmatched), _SHOWN) + min(len(file.unknown), _SHOWN)
    rest = len(unmatched) + len(file.unknown) - shown
    if rest:
        lines.append(f"  and {rest} more")
    lines.append("pass allow_unmatched=True to load the rest without them")
    return "\n".join(lines)


def _effect(pair: LoraPair) -> bool:
    """Whether the delta can differ from zero. Raises for values that are not finite."""
    largest = []
    for name, tensor in zip(pair.tensors, (pair.a, pair.b), strict=True):
        magnitude = largest_magnitude(tensor)
        if magnitude == float("inf"):
            raise AdapterIncompatible(f"tensor {name!r} holds values that are infinite or not a number")
        largest.append(magnitude)
    return min(largest) > 0 and pair.numbers.scale != 0


def _applied(target: AdapterTarget, pair: LoraPair, effective: bool) -> ReceiptEntry:
    return ReceiptEntry(
        module=target.module,
        applied=True,
        reason="" if effective else "A, B or the scale is zero",
        site=target.site,
        slice=target.slice,
        expert=target.expert,
        layer=target.layer,
        kind=target.kind,
        numbers=pair.numbers,
        nbytes=pair.nbytes,
    )


def _dropped(name: str, reason: str, pair: LoraPair | None) -> ReceiptEntry:
    return ReceiptEntry(
        module=name,
        applied=False,
        reason=reason,
        expert=pair.expert if pair else None,
        kind=pair.kind if pair else "linear",
        numbers=pair.numbers if pair else None,
        nbytes=pair.nbytes if pair else 0,
    )
