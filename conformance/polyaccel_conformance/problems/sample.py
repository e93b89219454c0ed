"""Cases of ``sample``: requests in permuted slots, some steps after they began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import DeviceState, SampleOutput, SamplingRow, SamplingSpec, SamplingState, StepInput
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import FORMATS, format_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Bounded, Expected, finish
from polyaccel_conformance.oracle.sampling import Distribution, Row
from polyaccel_conformance.problem import Exactly, Outputs, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.steps import build_step

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

ATTEMPTS = 6
FORCED = 30000.0
"""A logit that decides what is sampled whatever the filters are."""
NONE = np.zeros(0, dtype=np.int64)

ALONE: Mapping[str, Choice] = MappingProxyType(
    {"dims.rows": 5, "dims.vocabulary": 33, "attributes.logprobs": 3, "structure.history": "both"}
)
ONE_EACH: tuple[Mapping[str, Choice], ...] = (
    {"attributes.top_k": 3},
    {"attributes.top_p": 0.5},
    {"attributes.min_p": 0.125},
    {"attributes.repetition_penalty": 1.25},
    {"attributes.presence_penalty": 0.5},
    {"attributes.frequency_penalty": 0.25},
    {"structure.bias": "some"},
    {"structure.mask": "half"},
    {"structure.forbidden": "reached", "dims.steps": 1},
    {"structure.forbidden": "later", "dims.steps": 2},
    {"structure.forbidden": "past"},
)
"""What a step does only if a request asks for it, each asked for by nothing else in the step."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One request: what is written to its slot, the tokens that earlier steps sample, and this step's number."""

    row: SamplingRow
    forced: Ints
    uniform: float

    def at_step(self, logits: Floats, *, exact: bool) -> Row:
        """The row as ``sample`` must see it after the forced steps."""
        row, vocabulary = self.row, len(logits)
        output = np.concatenate([_ids(row.output_ids), self.forced])
        bias = np.zeros(vocabulary)
        if row.bias_ids is not None and row.bias_values is not None:
            bias[row.bias_ids] = row.bias_values
        allowed = np.ones(vocabulary, dtype=bool) if row.allowed is None else row.allowed.copy()
        if row.forbidden_ids is not None and len(output) < row.forbidden_until:
            allowed[row.forbidden_ids] = False
        counts = np.bincount(output, minlength=vocabulary)
        seen = counts > 0
        seen[_ids(row.prompt_ids)] = True
        return Row(
            logits=logits,
            seen=seen,
            counts=counts,
            bias=bias,
            allowed=allowed,
            temperature=row.temperature,
            top_k=row.top_k,
            top_p=row.top_p,
            min_p=row.min_p,
            repetition_penalty=row.repetition_penalty,
            presence_penalty=row.presence_penalty,
            frequency_penalty=row.frequency_penalty,
            exact=exact,
        )


class SampleProblem(Problem):
    """Ids, logprobs and what is left in the state.

    ``dyadic``: the kept ids have equal logits and their number is a power of two; uniforms lie on the boundaries. A
    filter's decision or a uniform that falls within the bounds of another answer is drawn again; ``ambiguous`` counts
    the rows of which more than one id is still accepted.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.exact = case.data == "dyadic"
        rows, vocabulary = case.dim("rows"), case.dim("vocabulary")
        self.request_slots = rows + case.dim("spare")
        self.slots = np.arange(rows)
        if case.structure["slots"] == "permuted":
            self.slots = self.source.choose("slots", self.request_slots, rows)
        self._alone: tuple[Bench, torch.Tensor] | None = None
        self.requests: list[Request] = []
        self.distributions: list[Distribution] = []
        logits = np.zeros((rows, vocabulary))
        for index in range(rows):
            self._draw_row(index, logits)
        self.operands = {"logits": Operand(logits, case.dtype)}
        self.ambiguous = sum(
            not d.choose(r.uniform).clear or len(d.choose(r.uniform).ids) > 1
            for d, r in zip(self.distributions, self.requests, strict=True)
        )

    # -- running -------------------------------------------------------------------------------------------------------

    def prepare(self, bench: Bench) -> Prepared:
        order = list(range(len(self.requests)))
        state, step = self._begin(bench, order)

        def collect(result: object, _: Mapping[str, torch.Tensor]) -> Outputs:
            # What follows is no operator, and need not be ordered with them.
            bench.synchronize()
            outputs = _collect(result)
            ids = outputs["ids"]
            last = state.last_tokens().index_select(0, bench.upload(torch.from_numpy(self.slots.astype(np.int64))))
            found = dict(outputs) | {"last_tokens": torch.stack((ids, last))}
            if self.case.structure["alone"] and order:
                found["alone"] = torch.stack((ids, self._elsewhere(bench)))
            return found

        def again() -> Mapping[str, object]:
            # The forced tokens are written like older ones: only the first call follows steps that sampled them.
            for index in order:
                request = self.requests[index]
                tokens = np.concatenate([_ids(request.row.output_ids), request.forced])
                state.write(int(self.slots[index]), replace(request.row, output_ids=tokens if len(tokens) else None))
            return {"step": bench.begin_step(step, DeviceState(sampling=state))}

        return Prepared(
            arguments={"state": state, "step": bench.begin_step(step, DeviceState(sampling=state))},
            collect=collect,
            static=self._static(),
            again=again,
        )

    def _static(self) -> dict[str, int]:
        return {"vocabulary": self.case.dim("vocabulary")}

    def _begin(self, bench: Bench, order: Sequence[int]) -> tuple[SamplingState, StepInput]:
        """A state in which the requests of ``order`` have had their forced steps, and the next step's input."""
        case = self.case
        spec = SamplingSpec(
            request_slots=self.request_slots, vocabulary=case.dim("vocabulary"), max_top_logprobs=case.dim("top")
        )
        state = bench.backend.allocate_sampling(spec, bench.device)
        if case.structure["reused"]:
            # What another request leaves behind must not be seen.
            for slot in self.slots[list(order)].tolist():
                state.write(slot, self._former())
        for index in order:
            state.write(int(self.slots[index]), self.requests[index].row)
        steps = len(self.requests[0].forced) if self.requests else 0
        prepared = Prepared(arguments={}, collect=lambda result, _: {}, static=self._static())
        inputs = self._input(order)
        call = bench.resolve(case.operator, prepared).call if steps else None
        for number in range(steps):
            forced = np.zeros((len(order), case.dim("vocabulary")))
            forced[np.arange(len(order)), [self.requests[i].forced[number] for i in order]] = FORCED
            step = bench.begin_step(inputs, DeviceState(sampling=state))
            assert call is not None
            call(bench.upload(Operand.rounded(forced, case.dtype).torch()), state, step)
        return state, inputs

    def _input(self, order: Sequence[int]) -> StepInput:
        slots = self.slots[list(order)]
        # Every other sequence has a token without logits before its last one.
        queries = [1 + i % 2 for i in range(len(order))]
        uniforms = [self.requests[i].uniform for i in order]
        return build_step(self.source, queries, request_slots=slots.tolist(), uniforms=np.array(uniforms))

    def _elsewhere(self, bench: Bench) -> torch.Tensor:
        """The ids of the same rows: the first alone, the others in reverse order, each in a state of its own. Found
        once: nothing that differs between calls can change them."""
        if self._alone is None or self._alone[0] is not bench:
            self._alone = (bench, self._draw_elsewhere(bench))
        return self._alone[1]

    def _draw_elsewhere(self, bench: Bench) -> torch.Tensor:
        rows = list(range(len(self.requests)))
        logits = self.operands["logits"].torch()
        prepared = Prepared(arguments={}, collect=lambda result, _: {}, static=self._static())
        ids: dict[int, torch.Tensor] = {}
        for order in ([0], rows[:0:-1]):
            if not order:
                continue
            state, inputs = self._begin(bench, order)
            step = bench.begin_step(inputs, DeviceState(sampling=state))
            result = bench.resolve(self.case.operator, prepared).call(bench.upload(logits[order]), state, step)
            bench.synchronize()
            found = _collect(result)["ids"]
            ids |= {row: found[i] for i, row in enumerate(order)}
        return torch.stack([ids[row] for row in rows])

    def _former(self) -> SamplingRow:
        vocabulary = self.case.dim("vocabulary")
        every = np.arange(vocabulary)
        return SamplingRow(
            temperature=0.25,
            top_k=1,
            top_p=0.5,
            min_p=0.5,
            repetition_penalty=2.0,
            presence_penalty=1.5,
            frequency_penalty=1.5,
            logprobs=0,
            bias_ids=every[::2],
            bias_values=np.full(len(every[::2]), 7.0, dtype=np.float32),
            allowed=every < (vocabulary + 1) // 2,
            prompt_ids=every[::3],
            output_ids=every[::2],
            forbidden_ids=every[:1],
            forbidden_until=1000,
        )

    # -- expected ------------------------------------------------------------------------------------------------------

    def expected(self) -> Mapping[str, Expected | Exactly]:
        found: dict[str, Expected | Exactly] = {
            "ids": Exactly(values=self._judge_ids, dtype=torch.int64),
            "last_tokens": Exactly(values=_judge_same("the last token of a request slot is not the sampled one")),
        }
        if self.case.structure["alone"] and self.requests:
            found["alone"] = Exactly(values=_judge_same("a row gives another id in another batch"))
        if any(request.row.logprobs >= 0 for request in self.requests):
            found["logprobs"] = Exactly(values=self._judge_logprobs)
        return found

    def _judge_ids(self, ids: npt.NDArray[np.generic]) -> str | None:
        if ids.shape != (len(self.requests),):
            return f"ids of shape {ids.shape} for {len(self.requests)} rows"
        for index, (distribution, request) in enumerate(zip(self.distributions, self.requests, strict=True)):
            chosen = distribution.choose(request.uniform)
            got = int(ids[index])
            if got not in chosen.ids and (chosen.clear or not _candidate(distribution, got)):
                return f"row {index}: id {got} at u = {request.uniform!r}, accepted {chosen.ids.tolist()}"
        return None

    def _judge_logprobs(self, joined: npt.NDArray[np.generic]) -> str | None:
        """``joined: [R, 2 + 2 top]``: id, its logprob, the top ids, the top logprobs."""
        top = self.case.dim("top")
        if joined.shape != (len(self.requests), 2 + 2 * top):
            return f"logprobs joined to {joined.shape}, expected {(len(self.requests), 2 + 2 * top)}"
        for index, (distribution, request) in enumerate(zip(self.distributions, self.requests, strict=True)):
            if request.row.logprobs < 0:
                continue
            row = joined[index].astype(np.float64)
            wanted = self.logprobs(distribution)
            picked = int(row[0])
            reason = _off(wanted, np.array([picked]), row[1:2]) if _candidate(distribution, picked) else None
            ids, certain = distribution.largest(top)
            got_ids, got = row[2 : 2 + top].astype(np.int64), row[2 + top :]
            missing = got[len(ids) :]
            if reason is None and np.any(certain & (got_ids[: len(ids)] != ids)):
                reason = f"top ids {got_ids.tolist()}, expected {ids.tolist()}"
            if reason is None:
                # An uncertain id is judged by the score at its place, which is not uncertain.
                reason = _off(wanted, ids, got[: len(ids)])
            if reason is None and not np.all(np.isneginf(missing)):
                reason = f"{missing.tolist()} where there are no more candidates, expected minus infinity"
            if reason is not None:
                return f"row {index}: {reason}"
        return None

    @staticmethod
    def logprobs(distribution: Distribution) -> Expected:
        """Log-probabilities of the whole vocabulary."""
        found = distribution.logprobs
        finite = Bounded(np.where(np.isfinite(found.value), found.value, 0.0), found.bound)
        return finish(finite, FORMATS["float32"])

    # -- drawing -------------------------------------------------------------------------------------------------------

    def _draw_row(self, index: int, logits: Floats) -> None:
        """Fill ``logits[index]`` and the request of one row."""
        row = self._parameters(index)
        forced = self._forced(index, row)
        for attempt in range(ATTEMPTS):
            values, uniform = self._draw(index, attempt, row)
            request = Request(row=row, forced=forced, uniform=uniform)
            distribution = Distribution(request.at_step(values, exact=self.exact))
            chosen = distribution.choose(uniform)
            if chosen.clear and len(chosen.ids) == 1:
                break
        logits[index] = values
        self.requests.append(request)
        self.distributions.append(distribution)

    def _draw(self, index: int, attempt: int, row: SamplingRow) -> tuple[Floats, float]:
        case, source, vocabulary = self.case, self.source, self.case.dim("vocabulary")
        name = f"{index} {attempt}"
        uniform = float(source.uniform(f"u {name}", (1,))[0])
        uniform = 0.0 if uniform < 0.1 else 1 - 2.0**-24 if uniform > 0.9 else np.floor(uniform * 2**24) / 2**24
        out = format_of(case.dtype)
        if case.data == "dyadic":
            return self._dyadic(name, row)
        if case.data == "ties":
            values = source.integers(f"logits {name}", (vocabulary,), -2, 2).astype(np.float64)
        else:
            values = source.normal(f"logits {name}", (vocabulary,)) * (6.0 if case.data == "peaked" else 2.0)
        if case.data == "masked":
            hidden = source.integers(f"hidden {name}", (vocabulary,), 0, 2) == 0
            hidden[int(np.flatnonzero(_open(row, vocabulary))[0])] = False
            values = np.where(hidden, -np.inf, values)
            if row.allowed is not None:
                # Never read: these ids are masked.
                values = np.where(row.allowed, values, np.nan)
        return out.round(values), uniform

    def _dyadic(self, name: str, row: SamplingRow) -> tuple[Floats, float]:
        """Equal logits on a power-of-two number of the ids that are open, next to nothing on the others."""
        vocabulary, source = self.case.dim("vocabulary"), self.source
        free = np.flatnonzero(_open(row, vocabulary))
        power = 1 << int(source.integers(f"power {name}", (1,), 0, len(free).bit_length() - 1)[0])
        kept = np.sort(free[source.choose(f"kept {name}", len(free), power)])
        values = np.full(vocabulary, -20000.0)
        values[kept] = float(source.integers(f"level {name}", (1,), -4, 4)[0])
        uniform = float(source.integers(f"u {name}", (1,), 0, power - 1)[0]) / power
        return format_of(self.case.dtype).round(values), uniform

    def _parameters(self, index: int) -> SamplingRow:
        """The case's attributes, of which a row of ``mixed`` rows has each with probability one half."""
        case, source, vocabulary = self.case, self.source, self.case.dim("vocabulary")
        keeps = np.ones(16, dtype=bool)
        if case.structure["rows"] == "mixed":
            keeps = source.integers(f"parameters {index}", (16,), 0, 1).astype(bool)

        def attribute(place: int, name: str, neutral: float) -> float:
            value = case.attributes[name]
            assert isinstance(value, int | float)
            return float(value) if keeps[place] else neutral

        history, mask = str(case.structure["history"]), str(case.structure["mask"])
        bias = str(case.structure["bias"]) if keeps[0] else "none"
        forbidden = str(case.structure["forbidden"]) if keeps[1] else "none"
        length = 2 * vocabulary // 3 + 1
        tokens = source.integers(f"history {index}", (2, length), 0, vocabulary - 1)
        biased = source.choose(f"biased {index}", vocabulary, max(vocabulary // 4, 1))
        values = source.integers(f"bias {index}", biased.shape, -8, 8) / 4.0
        output = tokens[1, : length // 2] if history in ("output", "both") else NONE
        until = len(output) + {"past": 0, "reached": 1, "later": 3}.get(forbidden, 100)
        return SamplingRow(
            temperature=attribute(2, "temperature", 1.0),
            top_k=int(attribute(3, "top_k", 0)),
            top_p=attribute(4, "top_p", 1.0),
            min_p=attribute(5, "min_p", 0.0),
            repetition_penalty=attribute(6, "repetition_penalty", 1.0),
            presence_penalty=attribute(7, "presence_penalty", 0.0),
            frequency_penalty=attribute(8, "frequency_penalty", 0.0),
            logprobs=min(int(attribute(9, "logprobs", -1)), case.dim("top")),
            bias_ids=None if bias == "none" else biased,
            bias_values=None if bias == "none" else (values if bias == "some" else np.full(len(biased), -100.0)),
            allowed=self._mask(index, mask) if keeps[10] else None,
            prompt_ids=tokens[0] if history in ("prompt", "both") else None,
            output_ids=output if len(output) else None,
            forbidden_ids=None if forbidden == "none" else self._forbidden(index),
            forbidden_until=until if forbidden != "none" else 0,
        )

    def _mask(self, index: int, kind: str) -> Bools | None:
        vocabulary = self.case.dim("vocabulary")
        if kind == "none":
            return None
        # Enough stays allowed that forbidden ids leave something.
        many = {"half": (vocabulary + 1) // 2, "few": 2}[kind]
        allowed = np.zeros(vocabulary, dtype=bool)
        allowed[self.source.choose(f"mask {index}", vocabulary, many)] = True
        allowed[vocabulary - 1] = True
        return allowed

    def _forbidden(self, index: int) -> Ints:
        """Some ids, never the last one, which every mask allows."""
        vocabulary = self.case.dim("vocabulary")
        ids = self.source.choose(f"forbidden {index}", vocabulary, max(vocabulary // 3, 1))
        kept: Ints = ids[ids != vocabulary - 1]
        return kept

    def _forced(self, index: int, row: SamplingRow) -> Ints:
        """Tokens of the steps before this one, of those that the row may sample."""
        steps = self.case.dim("steps")
        free = np.flatnonzero(_open(row, self.case.dim("vocabulary")))
        forced: Ints = free[self.source.integers(f"forced {index}", (steps,), 0, len(free) - 1)]
        return forced


def _open(row: SamplingRow, vocabulary: int) -> Bools:
    """Ids that neither the mask nor the ids forbidden at first exclude."""
    allowed = np.ones(vocabulary, dtype=bool) if row.allowed is None else row.allowed.copy()
    if row.forbidden_ids is not None:
        allowed[row.forbidden_ids] = False
    return allowed


def _ids(values: npt.NDArray[np.generic] | None) -> Ints:
    return NONE if values is None else values.astype(np.int64)


def _candidate(distribution: Distribution, token: int) -> bool:
    return 0 <= token < len(distribution.candidates) and bool(distribution.candidates[token])


def _off(wanted: Expected, ids: Ints, got: Floats) -> str | None:
    error = np.abs(got - wanted.value[ids])
    wrong = ~(error <= wanted.tolerance[ids])
    if not wrong.any():
        return None
    worst = int(np.argmax(wrong))
    token = int(ids[worst])
    return f"logprob {got[worst]!r} of id {token}, expected {wanted.value[token]!r} +- {wanted.tolerance[token]:.3g}"


def _judge_same(reason: str) -> object:
    def judge(both: npt.NDArray[np.generic]) -> str | None:
        wrong = np.flatnonzero(both[0] != both[1])
        return None if not len(wrong) else f"{reason}: row {wrong[0]} has {both[0, wrong[0]]} and {both[1, wrong[0]]}"

    return judge


def _collect(result: object) -> Outputs:
    if not isinstance(result, SampleOutput):
        raise TypeError(f"expected a SampleOutput, got {type(result).__name__}")
    if result.logprobs is None or result.top_ids is None or result.top_logprobs is None:
        return {"ids": result.ids}
    columns = (result.ids[:, None], result.logprobs[:, None], result.top_ids, result.top_logprobs)
    # Joined so that each logprob is judged with its id; ids below 2^24 are exact in float32.
    return {"ids": result.ids, "logprobs": torch.cat([column.to(torch.float32) for column in columns], dim=1)}


class SampleProblems(ProblemSet):
    """Every parameter of a request, alone and together."""

    operator = "sample"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.rows": (1, 0, 2, 3, 8),
            "dims.vocabulary": (17, 1, 2, 32, 33, 64, 257),
            "dims.spare": (0, 1, 5),
            "dims.top": (3, 1, 20),
            "dims.steps": (0, 1, 2),
            "attributes.temperature": (1.0, 0.0, 0.5, 1.75),
            "attributes.top_k": (0, 1, 3, 16, 1000),
            "attributes.top_p": (1.0, 0.5, 0.875, 0.0625),
            "attributes.min_p": (0.0, 0.125, 1.0),
            "attributes.repetition_penalty": (1.0, 1.25, 0.75),
            "attributes.presence_penalty": (0.0, 0.5, -0.5),
            "attributes.frequency_penalty": (0.0, 0.25, -0.25),
            "attributes.logprobs": (-1, 0, 3, 20),
            "structure.bias": ("none", "some", "ban"),
            "structure.mask": ("none", "half", "few"),
            "structure.forbidden": ("none", "until", "reached", "past", "later"),
            "structure.history": ("none", "prompt", "output", "both"),
            "structure.rows": ("same", "mixed"),
            "structure.slots": ("order", "permuted"),
            "structure.reused": (False, True),
            "structure.alone": (False, True),
            "layouts.logits": ("contiguous", "row_padded", "offset"),
            "data": ("normal", "dyadic", "ties", "peaked", "masked"),
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.rows": (0, 8), "dims.vocabulary": (1, 300), "attributes.top_k": (0, 40)}

    def large(self) -> Sequence[Mapping[str, Choice]]:
        # Sums of this length are only told apart where they are exact.
        sizes = {"dims.rows": 2, "dims.vocabulary": 32_000}
        long: Mapping[str, Choice] = {**sizes, "data": "dyadic", "attributes.top_p": 0.5}
        return (long, *({**ALONE, **changes} for changes in ONE_EACH))

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        """Equal masses stay equal without penalties and bias, and a power of two without top-k."""
        if axes["data"] != "dyadic":
            return axes
        return axes | {
            "attributes.repetition_penalty": 1.0,
            "attributes.presence_penalty": 0.0,
            "attributes.frequency_penalty": 0.0,
            "structure.bias": "none",
        }

    def problem(self, case: Case) -> Problem:
        return SampleProblem(case)
