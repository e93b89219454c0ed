"""Whether memory is touched only where the contract says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.compare import pattern
from polyaccel_conformance.harness.controls import all_of, linear_problem, verdict
from polyaccel_conformance.harness.memory import Poison, poison_pattern
from polyaccel_conformance.trial import LARGE, NEW_MEMORY, POISONED, Output, Setting, Trial

Mask = npt.NDArray[np.bool_]
Function = Callable[..., Any]


def never_written(trial: Trial) -> dict[str, Mask]:
    """By output, the elements that hold each poison in the call with that poison: nobody wrote them."""
    found = {}
    for name, output in trial.ask(POISONED).outputs.items():
        mask = _holds(output, Poison.NAN)
        if not mask.any():
            continue
        other = trial.ask(LARGE).outputs.get(name)
        if other is None or other.bits.shape != output.bits.shape:
            continue
        mask &= _holds(other, Poison.LARGE)
        if mask.any():
            # What is added to either poison leaves it as it is, and is no more seen than what was not written. It is
            # added to zero as well.
            plain = trial.ask(Setting(poison=Poison.ZERO, watched=True)).outputs[name]
            mask &= _holds(plain, Poison.ZERO)
        if mask.any():
            found[name] = mask
    return found


def _holds(output: Output, poison: Poison) -> Mask:
    if output.dtype is torch.bool:
        return np.zeros(output.bits.shape, dtype=np.bool_)
    mask: Mask = np.asarray(output.bits == poison_pattern(poison, output.dtype), dtype=np.bool_)
    return mask


class Unwritten(Check):
    """Every element of every output is written: none holds what its memory held before."""

    name = "memory.unwritten"

    def run(self, trial: Trial) -> Failure | None:
        for output, mask in never_written(trial).items():
            index = tuple(int(i) for i in np.argwhere(mask)[0])
            return Failure(
                check=self.name,
                cause="unwritten elements",
                message=f"{int(mask.sum())} of {mask.size} elements of {output} were never written, first {index}",
                output=output,
                index=index,
                pattern=pattern(mask),
            )
        return None

    def control(self, bench: Bench) -> Control:
        def wrap(fn: Function) -> Function:
            def tail_left(x: torch.Tensor, weight: object) -> torch.Tensor:
                y = fn(x, weight)
                new = torch.empty_like(y)
                new[:-1] = y[:-1]
                return new

            return tail_left

        return verdict(bench, self, linear_problem(), wrap)


class Reads(Check):
    """Results do not depend on what lies in new memory, around and between operands, and in unused room."""

    name = "memory.reads"

    def run(self, trial: Trial) -> Failure | None:
        unwritten = never_written(trial)
        nan, plain = trial.ask(POISONED), trial.ask()
        others = [(trial.ask(LARGE), "NaN or large numbers")] if LARGE in trial.poisoned() else []
        for other, kind in (*others, (plain, "NaN or zeros")):
            for name, output in nan.outputs.items():
                mask = _different(output, other.outputs.get(name))
                if name in unwritten and mask.shape == unwritten[name].shape:
                    mask &= ~unwritten[name]
                if not mask.any() or not self._repeats(trial, name):
                    continue
                index = tuple(int(i) for i in np.argwhere(mask)[0])
                return Failure(
                    check=self.name,
                    cause="reads memory that is not its own",
                    message=f"{int(mask.sum())} of {mask.size} elements of {name} differ between {kind} around the "
                    f"operands and in new memory, first {index}",
                    output=name,
                    index=index,
                    pattern=pattern(mask) if mask.ndim else "",
                )
        return None

    def _repeats(self, trial: Trial, name: str) -> bool:
        """Whether the same call again gives the same: else it is not the memory that makes the difference."""
        again = trial.ask(Setting(poison=Poison.NAN, repeat=1)).outputs.get(name)
        return not _different(trial.ask(POISONED).outputs[name], again).any()

    def control(self, bench: Bench) -> Control:
        def reads_gap(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> torch.Tensor:
                y: torch.Tensor = fn(x, weight).clone()
                y[0, 0] += x.as_strided((1,), (1,), x.storage_offset() + x.shape[1])[0]
                return y

            return wrong

        def adds_to_new(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> torch.Tensor:
                y = fn(x, weight)
                return torch.empty_like(y).add_(y)

            return wrong

        return all_of(*(verdict(bench, self, linear_problem(), wrap) for wrap in (reads_gap, adds_to_new)))


def _different(output: Output, other: Output | None) -> Mask:
    if other is None or other.bits.shape != output.bits.shape:
        return np.ones((), dtype=np.bool_)
    mask: Mask = np.asarray(output.bits != other.bits, dtype=np.bool_)
    return mask


class Writes(Check):
    """Nothing is written outside of the operands and the call's own memory."""

    name = "memory.writes"

    def run(self, trial: Trial) -> Failure | None:
        for setting in trial.poisoned():
            observation = trial.ask(setting)
            for argument, count in observation.trespassed.items():
                where = "memory that the call allocated" if argument == NEW_MEMORY else f"argument {argument!r}"
                return Failure(
                    check=self.name,
                    cause=f"writes outside of {where}",
                    message=f"{count} elements before, behind or between those of {where} were written to",
                )
        return None

    def control(self, bench: Bench) -> Control:
        def wrap(fn: Function) -> Function:
            def past_the_end(x: torch.Tensor, weight: object) -> torch.Tensor:
                y: torch.Tensor = fn(x, weight)
                end = x.storage_offset() + (x.shape[0] - 1) * x.stride(0) + x.shape[1]
                x.as_strided((1,), (1,), end).fill_(1.0)
                return y

            return past_the_end

        return verdict(bench, self, linear_problem(), wrap)


class Inputs(Check):
    """Operands, weights, caches and adapters are left as they were, unless the contract says that they are mutated."""

    name = "memory.inputs"

    def run(self, trial: Trial) -> Failure | None:
        observation = trial.ask(POISONED)
        spec, alias = trial.problem.spec, trial.problem.case.alias.partition("=")[2]
        mutable = {argument.name for argument in spec.arguments if argument.mutated} | {_mutated_alias(trial, alias)}
        for argument, count in observation.changed.items():
            if argument not in mutable:
                return Failure(
                    check=self.name,
                    cause=f"changes {argument!r}",
                    message=f"{count} elements of argument {argument!r} changed, which the contract calls an input",
                )
        for name, count in observation.disturbed.items():
            return Failure(check=self.name, cause="changes state", message=f"{count} elements of {name} changed")
        activity = observation.activity
        for argument, operator in (activity.operand_writes if activity is not None else {}).items():
            # What lands beside the elements is another check's.
            if argument not in mutable and argument not in observation.trespassed:
                return Failure(
                    check=self.name,
                    cause=f"writes to {argument!r}",
                    message=f"{operator} wrote to argument {argument!r}, an input; another stream may be reading it, "
                    "even if the old values were put back",
                )
        return None

    def control(self, bench: Bench) -> Control:
        def changes(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> torch.Tensor:
                y: torch.Tensor = fn(x, weight)
                x.neg_()
                return y

            return wrong

        def puts_back(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> torch.Tensor:
                x.mul_(2)
                y: torch.Tensor = fn(x, weight).div(2)
                x.div_(2)
                return y

            return wrong

        return all_of(*(verdict(bench, self, linear_problem(), wrap) for wrap in (changes, puts_back)))


def _mutated_alias(trial: Trial, original: str) -> str:
    """The argument whose memory an alias shares with a mutated one, empty for none."""
    alias = trial.problem.case.alias.partition("=")[0]
    names = {a.name for a in trial.problem.spec.arguments if a.mutated}
    return original if original and alias in names else ""


MEMORY_CHECKS: Mapping[str, Check] = {check.name: check for check in (Unwritten(), Reads(), Writes(), Inputs())}
