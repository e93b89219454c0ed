"""The dispatch plan: what is chosen, why nothing better is, and what a refusal leaves behind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import pytest
import torch

from polyaccel.backend import (
    Entry,
    OperatorError,
    Plan,
    Planned,
    Query,
    SiteRequest,
    TableBackend,
    TokenClass,
    UnsupportedError,
)
from polyaccel.backend.backend import Implementations
from polyaccel.backend.plan import KEYS, Offered, with_static
from polyaccel.backend.step import plan_key
from tests.backend.steps import EVERY_STEP, KeyedStep

X = torch.tensor([[1.0, -2.0]])
NORM = SiteRequest(site="norm", operator="rms_norm", static={"hidden": 2})
MLP = SiteRequest(site="mlp", operator="gate_up_act", static={"k": 4, "slices": (3, 3), "world_size": 1})
DOWN = SiteRequest(site="down", operator="row_parallel_add_norm", static={"k": 4, "slices": (3,), "world_size": 2})
WITHOUT, WITH = KeyedStep(), KeyedStep(adapters=True)
GELU = SiteRequest(site="gelu", operator="gelu")


def _answer(text: str) -> Callable[..., str]:
    return lambda *args, **kwargs: text


def _ranks_up_to(limit: int) -> Callable[[Query], list[str]]:
    def supports(query: Query) -> list[str]:
        rank = query.integer("largest_rank")
        return [] if rank <= limit else [f"rank {rank} exceeds {limit}"]

    return supports


def _plan(operators: Mapping[str, Implementations], *requests: SiteRequest, policy: str = "allow") -> Plan:
    return Plan(TableBackend("cpu", operators), requests, policy=policy)  # type: ignore[arg-type]


def _all(plan: Plan) -> dict[str, tuple[Planned, ...]]:
    return {name: site.planned for name, site in plan.sites.items()}


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_what_a_backend_offers_need_not_be_asked_for_again() -> None:
    backend = TableBackend("cpu", {"gelu": _answer("x")})
    offered = Offered.by(backend)
    backend.table = backend.composites = None  # type: ignore[assignment,method-assign]
    plan = Plan(backend, [SiteRequest(site="g", operator="gelu")], policy="allow", offered=offered)
    assert {planned.kind for planned in plan["g"].planned} == {"native"}


def test_every_column_is_asked_with_its_class_adapters_rank_and_ranges() -> None:
    asked: list[Query] = []

    def supports(query: Query) -> list[str]:
        asked.append(query)
        return []

    ranges = {TokenClass.DECODE: {"tokens": (1, 8)}, TokenClass.MIXED: {"tokens": (1, 64)}}
    request = SiteRequest(site="g", operator="gelu", static={"hidden": 5}, ranges={"segments": (0, 2)})
    plan = Plan(TableBackend("cpu", {"gelu": Entry(_answer("x"), supports=supports)}), [request], ranges=ranges)
    plan.extend(12)
    assert [(query.token_class, query.adapters) for query in asked] == [*KEYS, *KEYS]
    assert [query.static["largest_rank"] for query in asked] == [0, 1, 0, 1, 0, 12, 0, 12]
    assert {query.static["hidden"] for query in asked} == {5}
    assert [query.ranges["tokens"][1] for query in asked[:4]] == [8, 8, 64, 64]
    assert all(query.ranges["segments"] == (0, 2) and query.site == "g" for query in asked)


def test_the_first_entry_that_accepts_is_taken_and_the_refusals_before_it_are_its_reasons() -> None:
    entries = [
        Entry(_answer("a"), supports=lambda query: ["no sm_90", "hidden 2 below 64"], name="a"),
        Entry(_answer("b"), supports=lambda query: ["broken driver"], name="b"),
        Entry(_answer("c"), name="c", detail="fast"),
        Entry(_answer("d"), name="d"),
    ]
    plan = _plan({"rms_norm": entries}, NORM)
    planned = plan["norm"].planned[0]
    assert (planned.kind, planned.implementation, planned.detail) == ("native", "c", "fast")
    assert planned.reasons == ("a: no sm_90", "a: hidden 2 below 64", "b: broken driver")
    assert plan["norm"][WITHOUT](X) == "c"
    assert str(planned) == "c (fast)"


def test_an_operator_that_nobody_takes_is_a_composite_with_every_reason() -> None:
    refused = [Entry(_answer(n), supports=lambda query: ["too old"], name=n) for n in ("a", "b")]
    plan = _plan({"rms_norm": refused}, NORM, GELU)
    norm, gelu = plan["norm"].planned[0], plan["gelu"].planned[0]
    assert (norm.kind, norm.implementation) == ("composite", "composite.rms_norm")
    assert norm.reasons == ("a: too old", "b: too old")
    assert gelu.reasons == ("backend 'table' has no gelu",)
    assert norm.composites() == [norm]


def test_a_station_is_fused_or_taken_apart_for_each_column_by_itself() -> None:
    def no_adapters(query: Query) -> list[str]:
        return ["adapters are not fused"] if query.adapters else []

    fused = Entry(_answer("fused"), supports=no_adapters, name="fused")
    plan = _plan({"gate_up_act": fused, "linear": _answer("y"), "sgmv": _answer("y + delta")}, MLP)
    assert [p.kind for p in plan["mlp"].planned] == ["fused", "parts", "fused", "parts"]
    parts = plan["mlp"].planned[1]
    assert parts.reasons == ("fused: adapters are not fused",)
    assert [(p.operator, p.kind) for p in parts.parts] == [
        ("linear", "native"),
        ("sgmv", "native"),
        ("silu_and_mul", "composite"),
    ]
    assert [p.operator for p in parts.composites()] == ["silu_and_mul"]
    assert plan["mlp"][WITHOUT](X, None, WITHOUT, "silu") == "fused"


def test_without_adapters_a_station_needs_no_sgmv() -> None:
    plan = _plan({}, MLP)
    names = [[part.operator for part in planned.parts] for planned in plan["mlp"].planned]
    assert names == 2 * [["linear", "silu_and_mul"], ["linear", "sgmv", "silu_and_mul"]]


def test_a_station_inside_a_station_is_planned_too() -> None:
    calls: list[str] = []

    def row_parallel(x: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append("row_parallel_linear")
        return x

    def norm(x: torch.Tensor, weight: object, eps: float, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append("rms_norm")
        return x, residual

    plan = _plan({"row_parallel_linear": row_parallel, "rms_norm": norm}, DOWN)
    planned = plan["down"].planned[1]
    assert [(p.operator, p.kind) for p in planned.parts] == [("row_parallel_linear", "fused"), ("rms_norm", "native")]
    plan["down"][WITH](X, None, WITH, None, X, X, 1e-6)
    assert calls == ["row_parallel_linear", "rms_norm"]
    nested = _plan({}, DOWN)["down"].planned[1].parts[0]
    assert [p.operator for p in nested.parts] == ["linear", "sgmv", "all_reduce"]


def test_a_step_gets_the_implementation_of_its_own_column() -> None:
    def only(token_class: TokenClass, adapters: bool) -> Entry:
        def supports(query: Query) -> list[str]:
            return [] if (query.token_class, query.adapters) == (token_class, adapters) else ["another column"]

        return Entry(_answer(f"{token_class.value}{adapters}"), supports=supports)

    entries = [only(token_class, adapters) for token_class, adapters in KEYS]
    plan = _plan({"gelu": entries}, GELU)
    assert [plan["gelu"][step](X, "none") for step in EVERY_STEP] == [f"{c.value}{a}" for c, a in KEYS]
    assert [step.plan_key for step in EVERY_STEP] == [plan_key(c, a) for c, a in KEYS]


def test_an_operator_without_a_composite_that_is_refused_is_unsupported_under_every_policy() -> None:
    refusing = Entry(_answer("y"), supports=lambda query: ["k 4 is no multiple of 16"], name="gemm")
    for policy in ("allow", "warn", "strict"):
        with pytest.raises(UnsupportedError, match=r"'linear' at site 'mlp' is mandatory.*gemm: k 4 is no multiple"):
            _plan({"linear": refusing}, MLP, policy=policy)


# -- policies ----------------------------------------------------------------------------------------------------------


def test_strict_names_every_critical_composite_its_reasons_and_its_sites() -> None:
    sites = [SiteRequest(site=f"norm{i}", operator="rms_norm") for i in range(5)]
    refused = Entry(_answer("n"), supports=lambda query: ["no driver"], name="fast")
    with pytest.raises(UnsupportedError) as caught:
        _plan({"rms_norm": refused}, *sites, MLP, policy="strict")
    text = str(caught.value)
    assert "rms_norm: fast: no driver" in text
    assert "norm0 (decode), norm0 (decode with adapters), norm0 (mixed) and 17 more" in text
    assert "silu_and_mul: backend 'table' has no silu_and_mul" in text
    assert "sgmv: backend 'table' has no sgmv" in text
    assert 'policy="warn"' in text


def test_strict_lets_operators_that_are_not_critical_be_composites() -> None:
    plan = _plan({}, GELU, policy="strict")
    assert plan["gelu"].planned[0].kind == "composite"


def test_warn_says_the_same_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "polyaccel"):
        plan = _plan({}, NORM, policy="warn")
        plan.extend(8)
        plan.extend(16)
    (record,) = caplog.records
    assert "rms_norm: backend 'table' has no rms_norm" in record.getMessage()
    assert plan["norm"].planned[0].kind == "composite"


def test_warn_speaks_again_when_an_adapter_brings_a_new_composite(caplog: pytest.LogCaptureFixture) -> None:
    native: dict[str, Implementations] = {"rms_norm": _answer("n")}
    native["gate_up_act"] = Entry(_answer("f"), supports=_ranks_up_to(8), name="fused")
    with caplog.at_level(logging.WARNING, "polyaccel"):
        plan = _plan({**native, "silu_and_mul": _answer("s")}, MLP, NORM, policy="warn")
        assert caplog.records == []
        plan.extend(9)
    (record,) = caplog.records
    assert "sgmv: backend 'table' has no sgmv" in record.getMessage()


def test_allow_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "polyaccel"):
        _plan({}, NORM, MLP)
    assert caplog.records == []


# -- adapters arrive ---------------------------------------------------------------------------------------------------


def _limited(policy: str) -> Plan:
    operators: dict[str, Implementations] = {
        "linear": _answer("y"),
        "silu_and_mul": _answer("a"),
        "sgmv": [
            Entry(_answer("narrow"), supports=_ranks_up_to(16), name="narrow"),
            Entry(_answer("wide"), supports=_ranks_up_to(64), name="wide"),
        ],
    }
    return _plan(operators, MLP, SiteRequest(site="mlp2", operator="gelu"), policy=policy)


def test_extending_changes_the_adapter_columns_of_the_sites_that_it_concerns() -> None:
    plan = _limited("strict")
    before = plan.digest()
    assert plan.extend(16) == []
    at_16 = plan.digest()
    assert plan.extend(17) == ["mlp"]
    assert [p.parts[1].implementation for p in plan["mlp"].planned[1::2]] == ["wide", "wide"]
    assert plan["mlp"].planned[1].parts[1].reasons == ("narrow: rank 17 exceeds 16",)
    assert [len(p.parts) for p in plan["mlp"].planned[::2]] == [2, 2]
    assert len({before, at_16, plan.digest()}) == 3
    assert plan.largest_rank == 17


def test_a_smaller_rank_changes_nothing() -> None:
    plan = _limited("strict")
    plan.extend(20)
    digest = plan.digest()
    assert plan.extend(4) == []
    assert (plan.largest_rank, plan.digest()) == (20, digest)


def test_a_refused_extension_leaves_the_plan_as_it_was() -> None:
    plan = _limited("strict")
    plan.extend(8)
    planned, digest = _all(plan), plan.digest()
    calls = [plan["mlp"][step] for step in EVERY_STEP]
    with pytest.raises(UnsupportedError, match="wide: rank 65 exceeds 64"):
        plan.extend(65)
    assert (_all(plan), plan.digest(), plan.largest_rank) == (planned, digest, 8)
    assert [plan["mlp"][step] for step in EVERY_STEP] == calls
    assert plan.extend(64) == ["mlp"]


def test_a_refused_extension_falls_back_with_reasons_where_that_is_allowed() -> None:
    plan = _limited("allow")
    assert plan.extend(65) == ["mlp"]
    sgmv = plan["mlp"].planned[1].parts[1]
    assert sgmv.kind == "composite"
    assert sgmv.reasons == ("narrow: rank 65 exceeds 16", "wide: rank 65 exceeds 64")


# -- digests -----------------------------------------------------------------------------------------------------------


def test_ranks_with_other_dimensions_and_the_same_choices_agree() -> None:
    one = _plan({}, MLP, NORM)
    other = _plan({}, with_static(MLP, k=999, slices=(7, 7)), NORM)
    assert one.digest() == other.digest()


def test_another_choice_detail_or_site_is_another_digest() -> None:
    digests = [
        _plan({}, NORM).digest(),
        _plan({}, NORM, GELU).digest(),
        _plan({"rms_norm": _answer("n")}, NORM).digest(),
        _plan({"rms_norm": Entry(_answer("n"), name="other")}, NORM).digest(),
        _plan({"rms_norm": Entry(_answer("n"), name="other", detail="ride")}, NORM).digest(),
        Plan(TableBackend("cpu", {}, name="else"), [NORM], policy="allow").digest(),
    ]
    assert len(set(digests)) == len(digests)


def test_the_plan_is_plain_data_for_explanations() -> None:
    plan = _plan({}, MLP)
    data = plan.to_dict()
    assert (data["backend"], data["policy"], data["digest"]) == ("table", "allow", plan.digest())
    sites = data["sites"]
    assert isinstance(sites, dict)
    assert list(sites["mlp"]) == ["decode", "decode+adapters", "mixed", "mixed+adapters"]
    part = sites["mlp"]["decode"]["parts"][1]
    assert (part["operator"], part["kind"]) == ("silu_and_mul", "composite")
    assert part["reasons"] == ["backend 'table' has no silu_and_mul"]


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_calls_are_inside_an_operator_and_composites_are_recorded() -> None:
    inside: list[tuple[bool, str | None]] = []
    backend: TableBackend

    def norm(x: torch.Tensor) -> torch.Tensor:
        inside.append((backend.ledger.inside_operator, backend.ledger.native))
        return x

    backend = TableBackend("cpu", {"rms_norm": norm})
    plan = Plan(backend, [NORM, GELU], policy="allow")
    plan["norm"][WITHOUT](X)
    plan["gelu"][WITHOUT](X, "none")
    assert inside == [(True, "table.rms_norm")]
    assert not backend.ledger.inside_operator
    assert backend.ledger.counts() == {"table.rms_norm": 1, "composite.gelu": 1}


def test_a_native_call_counts_once_whether_or_not_it_launches_through_the_guard() -> None:
    backend: TableBackend

    def guarded(x: torch.Tensor) -> object:
        return backend.launcher.launch("mine.norm", (x,), torch.clone, x)

    backend = TableBackend("cpu", {"rms_norm": guarded, "gelu": lambda x, approximate: x})
    plan = Plan(backend, [NORM, GELU], policy="allow")
    plan["norm"][WITHOUT](X)
    plan["gelu"][WITHOUT](X, "none")
    assert backend.ledger.counts() == {"mine.norm": 1, "table.gelu": 1}


def test_a_call_that_raises_is_left_too() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("illegal address")

    backend = TableBackend("cpu", {"rms_norm": broken})
    plan = Plan(backend, [NORM, GELU], policy="allow")
    with pytest.raises(OperatorError, match="illegal address") as caught:
        plan["norm"][WITHOUT](X)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert [operand.name for operand in caught.value.operands] == ["x"]
    with pytest.raises(OperatorError, match="TypeError"):
        plan["gelu"][WITHOUT]()
    assert (backend.ledger.inside_operator, backend.ledger.native) == (False, None)


def _falling_back(policy: str) -> tuple[TableBackend, Plan]:
    plan: Plan

    def norm(x: torch.Tensor) -> object:
        return plan["gelu"][WITHOUT](x, "none")

    backend = TableBackend("cpu", {"rms_norm": norm})
    plan = Plan(backend, [NORM, GELU], policy=policy)  # type: ignore[arg-type]
    return backend, plan


def test_a_composite_inside_a_native_call_is_an_error_under_strict() -> None:
    backend, plan = _falling_back("strict")
    with pytest.raises(UnsupportedError, match=r"table\.rms_norm called the composite of 'gelu'"):
        plan["norm"][WITHOUT](X)
    assert (backend.ledger.inside_operator, backend.ledger.native) == (False, None)


@pytest.mark.parametrize("policy", ["warn", "allow"])
def test_a_composite_inside_a_native_call_is_counted_otherwise(policy: str) -> None:
    backend, plan = _falling_back(policy)
    plan["norm"][WITHOUT](X)
    plan["norm"][WITHOUT](X)
    assert backend.ledger.composites() == {"nested_composite.gelu": 2, "composite.gelu": 2}


def test_a_composite_taken_from_the_backend_itself_is_seen_inside_a_native_call_too() -> None:
    backend: TableBackend

    def norm(x: torch.Tensor) -> object:
        return backend.composites()["gelu"](x, "none")

    backend = TableBackend("cpu", {"rms_norm": norm})
    plan = Plan(backend, [NORM], policy="strict")
    with pytest.raises(UnsupportedError, match=r"table\.rms_norm called the composite of 'gelu'"):
        plan["norm"][WITHOUT](X)
