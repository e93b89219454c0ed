"""Cases of ``moe_route``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend.support import Static
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Expected, finish
from polyaccel_conformance.oracle.moe import Routed, Routing, route
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet

Floats = npt.NDArray[np.float64]

EXACT_KINDS = ("levels", "tied", "pairs")
KINDS = ("normal", *EXACT_KINDS, "wide")
ATTEMPTS = 4


class MoeRouteProblem(Problem):
    """Weights and ids of the chosen experts.

    Scores of a row are either equal, by equal operands, or further apart than their bounds: the ids are determined.
    Rows that are not so are drawn again; the last resort is a row of zeros, whose scores differ by the bias alone,
    which lies on a grid. ``redrawn`` counts those.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.exact = case.data in EXACT_KINDS
        tokens, experts = case.dim("tokens"), case.dim("experts")
        self.routing = Routing(
            top_k=case.dim("top_k"),
            scoring=str(case.attributes["scoring"]),
            renormalise=bool(case.attributes["renormalise"]),
            groups=_integer(case, "groups"),
            topk_groups=_integer(case, "topk_groups"),
            scale=_number(case.attributes["scale"]),
        )
        self._bias = self._draw_bias(experts)
        logits = FORMATS[case.dtype].round(self._draw(tokens, experts, 0))
        open_rows = np.flatnonzero(~self._route(logits).clear)
        for attempt in range(1, ATTEMPTS):
            if not len(open_rows):
                break
            logits[open_rows] = FORMATS[case.dtype].round(self._draw(len(open_rows), experts, attempt))
            open_rows = open_rows[~self._route(logits[open_rows]).clear]
        logits[open_rows] = 0.0
        self.redrawn = len(open_rows)
        self.operands = {"logits": Operand(logits, case.dtype)}
        if self._bias is not None:
            self.operands["bias"] = Operand(self._bias, "float32")

    def prepare(self, bench: Bench) -> Prepared:
        case, routing = self.case, self.routing
        attributes: dict[str, Static] = {
            "top_k": routing.top_k,
            "scoring": routing.scoring,
            "renormalise": routing.renormalise,
            "groups": routing.groups,
            "topk_groups": routing.topk_groups,
            "scale": routing.scale,
        }
        return Prepared(
            arguments=attributes,
            collect=_collect,
            static={
                **attributes,
                "dtype": case.dtype,
                "hidden": 0,
                "world_size": 1,
                "experts": case.dim("experts"),
                "bias": self._bias is not None,
            },
            ranges={"tokens": (case.dim("tokens"), max(case.dim("tokens"), 1))},
        )

    def expected(self) -> Mapping[str, Expected | Exactly]:
        logits = self.operands["logits"].values.astype(np.float64)
        routed = self._route(logits)
        if not np.isfinite(logits).all() and self.routing.scoring != "softmax_topk":
            # Where a NaN sorts is not defined, and the others' weights follow from what was chosen.
            return {"ids": Exactly(values=_undefined, dtype=torch.int32), "weights": Exactly(values=_undefined)}
        ids = Exactly(values=routed.ids, dtype=torch.int32)
        return {"ids": ids, "weights": finish(routed.weights, FORMATS["float32"])}

    def _route(self, logits: Floats) -> Routed:
        return route(logits, self._bias, self.routing)

    def _draw_bias(self, experts: int) -> Floats | None:
        kind = self.case.structure["bias"]
        if kind == "none":
            return None
        if kind == "equal" or self.case.data in ("tied", "pairs"):
            return np.full(experts, 0.375)
        reach = 16 if kind == "small" else 640
        grid: Floats = self.source.integers("bias", (experts,), -reach, reach) / 64.0
        return grid

    def _draw(self, tokens: int, experts: int, attempt: int) -> Floats:
        """``[tokens, experts]``; ``levels``: a permutation of multiples of 1/16; ``pairs``: each of them twice."""
        name = f"logits {attempt}"
        kind = self.case.data
        if kind == "tied":
            # Many values: some vectorised functions differ from their scalar tails in the last bit for a few of them.
            return np.broadcast_to(4.0 * self.source.normal(name, (tokens, 1)), (tokens, experts))
        if kind in ("levels", "pairs"):
            keys = self.source.uniform(name, (tokens, experts))
            place = np.argsort(keys, axis=1, kind="stable") // (2 if kind == "pairs" else 1)
            levels: Floats = (place - experts // 4) / 16.0
            return levels
        drawn = self.source.normal(name, (tokens, experts))
        return drawn * 4.0 if kind == "wide" else drawn


def _undefined(_: npt.NDArray[np.generic]) -> None:
    """Nothing is said about an output."""


def _collect(result: object, _: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"expected (weights, ids), got {type(result).__name__}")
    return {"weights": result[0], "ids": result[1]}


def _number(value: Choice) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _integer(case: Case, name: str) -> int:
    value = case.attributes[name]
    assert isinstance(value, int)
    return value


class MoeRouteProblems(ProblemSet):
    """The three scorings with every attribute."""

    operator = "moe_route"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": (1, 0, 2, 5, 17, 33),
            "dims.experts": (8, 1, 2, 4, 7, 16, 60, 64, 128),
            "dims.top_k": (2, 1, 4, 8),
            "attributes.scoring": ("softmax_topk", "topk_softmax", "sigmoid"),
            "attributes.renormalise": (False, True),
            "attributes.groups": (1, 2, 4, 8),
            "attributes.topk_groups": (1, 2, 4),
            "attributes.scale": (1.0, 2.5, 0.5),
            "structure.bias": ("none", "small", "large", "equal"),
            "layouts.logits": ("contiguous", "row_padded", "offset"),
            "layouts.bias": ("contiguous", "row_padded", "offset"),
            "data": KINDS,
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 40), "dims.experts": (1, 160), "dims.top_k": (1, 12)}

    def large(self) -> Sequence[Mapping[str, Choice]]:
        return tuple(
            {"dims.tokens": 130, "dims.experts": 256, "dims.top_k": 8, "attributes.scoring": scoring}
            for scoring in ("softmax_topk", "topk_softmax", "sigmoid")
        )

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        """Groups and bias belong to sigmoid; groups divide the experts and leave enough of them."""
        axes = dict(axes)
        if axes["attributes.scoring"] != "sigmoid":
            axes |= {"attributes.groups": 1, "structure.bias": "none"}
        groups, experts, top_k = (axes[n] for n in ("attributes.groups", "dims.experts", "dims.top_k"))
        assert isinstance(groups, int)
        assert isinstance(experts, int)
        assert isinstance(top_k, int)
        experts = -(-experts // groups) * groups
        kept = axes["attributes.topk_groups"]
        assert isinstance(kept, int)
        kept = min(kept, groups)
        top_k = min(top_k, kept * (experts // groups))
        return axes | {"dims.experts": experts, "attributes.topk_groups": kept, "dims.top_k": top_k}

    def problem(self, case: Case) -> Problem:
        return MoeRouteProblem(case)
