"""Bugs in how failures are found, told and blamed. Found by tests of this folder."""

from __future__ import annotations

from tests.npu.mutants.mutant import ByTest, Edit, Mutant

DEVICE, ERRORS, HEALTH = "tests/npu/test_device.py", "tests/npu/test_errors.py", "tests/npu/test_health.py"
BLAME = f"{DEVICE}::test_blame_names_the_call_its_strides_and_its_contiguity"
STRIDED = f"{DEVICE}::test_a_strided_x1_is_refused_as_cann_refuses_it_and_no_numbers_follow"


def _one(name: str, what: str, file: str, old: str, new: str, test: str) -> Mutant:
    return Mutant(name, what, (Edit(file, old, new),), ByTest(test))


FAILURES: tuple[Mutant, ...] = (
    _one(
        "health.unchecked",
        "After an asynchronous failure calls go on, and give numbers.",
        "health.py",
        "        if self.lost is not None:\n            raise",
        "        if self.lost == '':\n            raise",
        STRIDED,
    ),
    Mutant(
        "health.not_lost",
        "An asynchronous failure is an ordinary error, after which everything goes on.",
        (
            Edit("issue.py", "        if failure.asynchronous:\n", "        if failure.asynchronous is None:\n"),
            Edit(
                "device.py",
                "        lost = issuer.health.lose(failure, rank)\n",
                '        lost = OperatorError("synchronize", str(failure))\n',
            ),
        ),
        ByTest(STRIDED),
    ),
    _one(
        "blame.one_before",
        "The call before the one that failed is blamed.",
        "replay.py",
        'report = {"kernel": call.kernel,',
        'report = {"kernel": calls[number - 2].kernel,',
        "tests/npu/test_mutants.py::test_blame_names_the_call_that_fails_among_others",
    ),
    _one(
        "blame.dense",
        "Calls are repeated with dense operands, and nothing fails.",
        "journal.py",
        "        return storage.as_strided(shape, stride, offset)\n",
        "        return storage.as_strided(shape, stride, offset).contiguous()\n",
        BLAME,
    ),
    _one(
        "guard.none",
        "Kernels go to whatever device is current.",
        "backend.py",
        'return device.type == "npu" and runtime.npu().current_device() == device.index',
        "return True",
        "tests/npu/test_mutants.py::test_a_call_on_another_card_than_the_current_one_enters_it",
    ),
    _one(
        "guard.not_left",
        "The card of a call stays current after it.",
        "backend.py",
        "    scope: AbstractContextManager[object] = runtime.npu().device(device)\n    return scope\n\n\n"
        "def _is_current",
        "    from contextlib import nullcontext\n\n    runtime.npu().set_device(device)\n    return nullcontext()\n\n\n"
        "def _is_current",
        "tests/npu/test_mutants.py::test_a_call_on_another_card_than_the_current_one_enters_it",
    ),
    _one(
        "cann.candidates",
        "A release candidate is taken for its release.",
        "cann.py",
        "int(found[2]), found[3] is None, int(found[4]))",
        "int(found[2]), True, int(found[4]))",
        "tests/npu/test_cann.py::test_the_oldest_and_all_that_come_after_it_are_taken_whatever_they_export",
    ),
)
