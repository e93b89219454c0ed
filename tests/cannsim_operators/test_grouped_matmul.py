"""aclnnGroupedMatmulV4: every legal scene against float64, and what the page forbids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_cannsim.operators.environment import CHIP_310P
from polyaccel_cannsim.operators.refusal import INNER, INVALID, NULL_POINTER, NotSimulated, Refusal
from tests.cannsim_operators.operands import FLOATS, check, close, draw, environment, exact, refused, run

GROUPED = "aclnnGroupedMatmulV4"
BIAS = {torch.float16: torch.float16, torch.bfloat16: torch.float32, torch.float32: torch.float32}


def call(x: Any, weight: Any, out: Any, groups: Any = None, **given: Any) -> tuple[Any, ...]:
    c = {"bias": (), "split": 3, "kind": 0, "form": 0, "act": 0, "scale": ()} | given
    empty: tuple[()] = ()
    head = (x, weight, c["bias"], c["scale"], empty, empty, empty, empty, groups, empty, empty, empty)
    return (*head, c["split"], c["kind"], c["form"], c["act"], out, empty, empty)


@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    dtype=st.sampled_from(FLOATS),
    scene=st.sampled_from(["single", "list", "lists", "all"]),
    turned=st.booleans(),
    biased=st.booleans(),
    form=st.sampled_from([0, 1]),
)
def test_every_scene_of_groups_along_rows_matches_float64(
    seed: int,
    sizes: list[int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    scene: str,
    turned: bool,
    biased: bool,
    form: int,
) -> None:
    k, n = widths
    if dtype == torch.float32:
        scene = "single"  # float32 takes single tensors only
    if scene in ("list", "lists", "all") and len(sizes) == 1:
        sizes = [*sizes, 2]
    x = draw(seed, sum(sizes), k, dtype=dtype)
    weight = draw(seed + 1, len(sizes), n, k, dtype=dtype).transpose(1, 2)
    weight = weight if turned else weight.contiguous()
    bias = draw(seed + 2, len(sizes), n).to(BIAS[dtype])
    ends = np.cumsum(sizes).tolist()
    groups = torch.tensor(sizes if form else ends)
    out = torch.full((sum(sizes), n), 9.0, dtype=dtype)
    parts = tuple(part.clone() for part in x.split(sizes))
    weights: tuple[torch.Tensor, ...] = (weight,) if scene == "single" else tuple(weight)
    biases: tuple[torch.Tensor, ...] = ((bias,) if scene == "single" else tuple(bias)) if biased else ()
    outs: tuple[torch.Tensor, ...] = tuple(out.split(sizes)) if scene == "all" else (out,)
    given_x = (x,) if scene in ("single", "list") else parts
    if scene == "all":
        run(GROUPED, *call(given_x, weights, outs, None, bias=biases, split=0, kind=-1))
    else:
        run(GROUPED, *call(given_x, weights, outs, groups, bias=biases, form=form))
    for g, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        rows = exact(x[end - size : end])
        wanted, magnitude = rows @ exact(weight[g]), abs(rows) @ abs(exact(weight[g]))
        if biased:
            wanted, magnitude = wanted + exact(bias[g]), magnitude + abs(exact(bias[g]))
        close(out[end - size : end], wanted, magnitude, terms=k + 1)


X, W, OUT = torch.ones(5, 8).half(), torch.ones(2, 8, 16).half(), torch.ones(5, 16).half()
GROUPS = torch.tensor([2, 5])


def test_the_call_that_the_refusals_start_from_is_legal() -> None:
    check(GROUPED, *call((X,), (W,), (OUT,), GROUPS))
    check("aclnnGroupedMatmulV5", *call((X,), (W,), (OUT,), GROUPS)[:16], None, (OUT,), (), ())
    check(GROUPED, *call((X[::1],), (W,), (OUT,), GROUPS), env=environment(chip=CHIP_310P))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (call((X,), (W,), (OUT,), None), "groupList must not be null"),
        (call((X,), (W,), (OUT,), GROUPS.int()), "dtype support list"),
        (call((X,), (W,), (OUT,), torch.tensor([1, 2, 5])), "one value for each"),
        (call((X,), (W,), (OUT,), GROUPS, split=0), "splitItem 2 or 3"),
        (call((X,), (W,), (OUT,), GROUPS, split=4), "splitItem"),
        (call((X,), (W,), (OUT,), GROUPS, kind=1), "groupType 1"),
        (call((X,), (W,), (OUT,), GROUPS, form=2), "groupListType 2"),
        (call((X,), (W,), (OUT,), GROUPS, act=1), "actType"),
        (call((torch.ones(8, 5).half().t(),), (W,), (OUT,), GROUPS), "transposed"),
        (call((X,), (torch.ones(2, 8, 32).half()[..., ::2],), (OUT,), GROUPS), "contiguous or transposed"),
        (call((X,), tuple(torch.ones(2, 8, 16).float()), (OUT,), GROUPS), "one dtype"),
        (call((X.float(),), tuple(W.float()), (OUT.float(),), GROUPS), "all single tensors"),
        (call((X.double(),), (W.double(),), (OUT.double(),), GROUPS), "dtype support list"),
        (call((X.bfloat16(),), (W.bfloat16(),), (OUT.bfloat16(),), GROUPS, bias=(torch.ones(2, 16).half(),)), "bias"),
        (call((X,), (W,), (OUT,), GROUPS, bias=(torch.ones(16).half(),)), "does not fit weight"),
        (call((X,), (W[0], W[1][:, :8].contiguous()), (OUT,), GROUPS), "same n"),
        (call((X,), (W[0], W[1].t().contiguous().t()), (OUT,), GROUPS), "either all"),
        (call((X[:, :7].contiguous(),), (W,), (OUT,), GROUPS), "dim k value"),
        (call((X,), (W,), (OUT[:4],), GROUPS), "inferred shape"),
        (call((X, X), (W,), (OUT,), GROUPS), "x separated"),
        (call((X, X), tuple(W), (OUT, OUT), GROUPS, kind=-1, split=0), "no groupList"),
    ],
)
def test_the_simulator_refuses_what_the_page_forbids(arguments: tuple[Any, ...], words: str) -> None:
    refused(INVALID, words, GROUPED, *arguments)


def test_the_simulator_refuses_a_last_axis_of_65536() -> None:
    x, w = torch.ones(1, 65536).half(), torch.ones(1, 65536, 1).half()
    refused(INVALID, "less than 65536", GROUPED, *call((x,), (w,), (torch.ones(1, 1).half(),), torch.tensor([1])))


def test_the_simulator_refuses_more_than_128_tensors() -> None:
    x, w = torch.ones(129, 2).half(), tuple(torch.ones(129, 2, 2).half())
    refused(INVALID, "1 to 128", GROUPED, *call((x,), w, (torch.ones(129, 2).half(),), torch.arange(1, 130)))


def test_the_simulator_refuses_widths_that_are_no_multiple_of_16_on_310p() -> None:
    narrow = call((X,), (W[..., :8].contiguous(),), (OUT[:, :8].contiguous(),), GROUPS)
    refused(INVALID, "multiple of 16", GROUPED, *narrow, env=environment(chip=CHIP_310P))


@pytest.mark.parametrize("groups", [[2, 4], [3, 2], [-1, 5], [2, 6]])
def test_a_group_list_that_does_not_cover_the_rows_is_caught_on_the_device(groups: list[int]) -> None:
    compute = check(GROUPED, *call((X,), (W,), (OUT,), torch.tensor(groups)))
    with pytest.raises(Refusal, match="does not cut") as caught:
        compute()
    assert caught.value.code == INNER


def test_missing_lists_and_quantisation_are_refused() -> None:
    refused(NULL_POINTER, "weight", GROUPED, *call((X,), (), (OUT,), GROUPS))
    with pytest.raises(NotSimulated, match="scale"):
        check(GROUPED, *call((X,), (W,), (OUT,), GROUPS, scale=(torch.ones(2, 16),)))
