"""Both generations of torch_npu's error text are read into the same parts."""

from __future__ import annotations

import pytest

from polyaccel_npu.errors import CAUSES, parse

ASYNCHRONOUS = (
    "The Inner error is reported as above. The process exits for this inner error, and the current working operator "
    "name is aclnnMatmulAllReduce.\n"
    "Since the operator is called asynchronously, the stacktrace may be inaccurate. If you want to get the accurate "
    "stacktrace, please set the environment variable ASCEND_LAUNCH_BLOCKING=1.\n"
)
OLD = (
    "call aclnnMatmulAllReduce failed, detail:EZ9999: Inner Error!\n"
    "EZ9999: Op MatmulAllReduce has 1 uncontiguous input, but set 0 auto conversion\n\n"
    "[ERROR] 2024-12-02-07:21:17 (PID:1123, Device:1, RankID:1) ERR01005 OPS internal error"
)
NEW = (
    "npu_mm_all_reduce_base:build/MatmulAllReduceBaseKernelNpuOpApi.cpp:120 NPU function error: call "
    "aclnnMatmulAllReduceV2 failed, error code is 161002\n"
    "[ERROR] 2026-08-21-10:00:00 (PID:7, Device:3, RankID:-1) ERR00100 PTA call acl api failed.\n"
    "EZ1001: [PID: 7] x1's k 5 differs from x2's k 4.\n"
)


def test_the_first_generation_names_operator_rank_code_and_cause() -> None:
    found = parse(OLD)
    assert (found.operator, found.generation) == ("aclnnMatmulAllReduce", 1)
    assert (found.code, found.module, found.meaning) == ("ERR01005", "OPS", "internal error")
    assert (found.rank, found.device) == (1, 1)
    assert found.cann == "EZ9999"
    assert not found.asynchronous


def test_the_second_generation_names_status_and_canns_own_sentence() -> None:
    found = parse(NEW)
    assert (found.operator, found.generation, found.status) == ("aclnnMatmulAllReduceV2", 2, 161002)
    assert (found.code, found.module, found.meaning) == ("ERR00100", "PTA", "call acl api failed")
    assert (found.rank, found.device) == (None, 3)
    assert (found.cann, found.detail) == ("EZ1001", "[PID: 7] x1's k 5 differs from x2's k 4.")
    assert "refused (first phase)" in str(found)


def test_an_asynchronous_failure_is_known_as_one_and_still_names_its_operator() -> None:
    found = parse(ASYNCHRONOUS + NEW)
    assert found.asynchronous
    assert parse(ASYNCHRONOUS).operator == "aclnnMatmulAllReduce"
    assert "found after the call" in str(found)


def test_compact_output_without_a_code_still_says_what_the_status_means() -> None:
    found = parse("call aclnnRmsNorm failed, error code is 561002")
    assert (found.code, found.meaning, found.generation) == ("", "tiling failed", 2)


def test_a_missing_function_says_that_cann_is_too_old() -> None:
    found = parse("aclnnFoo or aclnnFooGetWorkspaceSize not in libopapi.so, or libopapi.sonot found. ERR01004")
    assert found.operator == "aclnnFoo"
    assert "too old" in found.detail


@pytest.mark.parametrize("cause", sorted(CAUSES))
def test_every_cause_has_words(cause: str) -> None:
    found = parse(f"[ERROR] (PID:1, Device:0, RankID:2) ERR02{cause} DIST")
    assert (found.module, found.meaning, found.rank) == ("DIST", CAUSES[cause], 2)


def test_memory_that_ran_out_is_told_from_other_failures() -> None:
    assert parse("NPU out of memory. Tried to allocate 2.00 GiB").out_of_memory
    assert not parse(NEW).out_of_memory


def test_an_exception_of_someone_else_is_not_taken_for_one_of_the_npus() -> None:
    assert not parse("shape '[2, 3]' is invalid for input of size 5").is_npu


@pytest.mark.parametrize(
    "text",
    [
        "EI0002: the collective of hccl_world on rank 0 did not finish within 2 s\n",
        "HcclBarrier failed\n[ERROR] 2026-11-23-01:00:00 (PID:7, RankID:0) ERR02200 DIST call hccl api failed.",
        "store wait timed out\n[ERROR] 2026-11-23-01:00:00 (PID:7, Device:0, RankID:0) ERR02005 DIST internal error",
    ],
)
def test_what_ranks_do_to_each_other_is_told_from_what_an_operator_does(text: str) -> None:
    assert parse(text).communication
    assert not parse(OLD).communication
    assert not parse(NEW).communication
