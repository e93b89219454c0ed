"""Merging an adapter into the base weights, and undoing it bit for bit."""

from __future__ import annotations

import torch

from polyaccel.backend.backend import Backend
from polyaccel.backend.errors import AdapterError
from polyaccel.lora.adapter_file import AdapterFile, LoraPair
from polyaccel.lora.match import match_adapter
from polyaccel.lora.target import AdapterTarget
from polyaccel.models.model import Model
from polyaccel.weights.checkpoint import Checkpoint


class Merger:
    """Merges on one rank. ``unmerge`` reads the touched weights from the checkpoint again, so that no bit is left
    behind and no second copy of the base is kept."""

    def __init__(self, model: Model, backend: Backend) -> None:
        self._model, self._backend = model, backend
        self._touched: dict[str, None] = {}

    def merge(self, path: str, weight: float) -> None:
        """``W += weight * scale * B @ A`` on this rank's part of every module, in float32 with one rounding.

        Raises:
            AdapterError: a module cannot be merged into; nothing has been changed.
        """
        # What was left out when the adapter was loaded, with the caller's leave, is left out here too.
        matched = match_adapter(
            AdapterFile.open(path), self._model.targets(), allow_unmatched=True, allow_no_effect=True
        )
        weights = self._model.weights()
        for target, _ in matched.pairs:
            self._check(target)
        by_site: dict[str, list[tuple[AdapterTarget, LoraPair]]] = {}
        for target, pair in matched.pairs:
            by_site.setdefault(target.site, []).append((target, pair))
        for site, pairs in by_site.items():
            base = weights[site]
            dense = self._backend.dequantize(base).to("cpu", torch.float32, copy=True)
            self._touched[site] = None
            base.reopen()
            for target, pair in pairs:
                start = base.spec.starts[target.slice]
                stop = start + target.out_rows.size if target.kind == "linear" else start + target.in_cols.size
                part = dense[start:stop] if target.expert is None else dense[target.expert, start:stop]
                delta = _delta(target, pair)
                part[:, : delta.shape[1]] += delta * weight
                base.write(target.slice, part, expert=target.expert)
            base.seal()

    def unmerge(self, checkpoint: Checkpoint) -> None:
        """Restore every touched weight from the checkpoint."""
        for site in self._touched:
            self._model.reload(checkpoint, site)
        self._touched.clear()

    def _check(self, target: AdapterTarget) -> None:
        spec = self._model.weights()[target.site].spec
        if spec.quantisation is not None:
            raise AdapterError(
                f"module {target.module!r} is quantised: a merged weight cannot be represented in "
                f"{spec.quantisation.bits} bits; "
                "use the adapter unmerged"
            )
        if self._is_tied(target.site):
            raise AdapterError(
                f"module {target.module!r} shares its weight with another module, which the merge would change too; "
                "use the adapter unmerged"
            )

    def _is_tied(self, site: str) -> bool:
        weights = self._model.weights()
        return weights[site].spec.tied_to is not None or any(w.spec.tied_to == site for w in weights.values())


def _delta(target: AdapterTarget, pair: LoraPair) -> torch.Tensor:
    """This rank's part of ``scale * B @ A`` in float32; for an embedding transposed, as its table is ``[rows,
    hidden]``."""
    a = target.in_cols.take(pair.a, 1).to(torch.float32)
    b = target.out_rows.take(pair.b, 0).to(torch.float32)
    delta = (b @ a) * pair.numbers.scale
    return delta.T if target.kind == "embedding" else delta
