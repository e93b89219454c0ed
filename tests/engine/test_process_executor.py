"""Ranks as processes: the same answers at every world size, and every way to die reported in time, with its cause."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from polyaccel import (
    LLM,
    AdapterIncompatible,
    CommunicationError,
    EngineDead,
    ModelLoadError,
    OutOfMemory,
    SamplingParams,
    WorkerError,
)
from polyaccel.engine import process_executor
from tests.support.processes import children, is_running, open_files, wait_gone
from tests.support.tiny_model import BLOCK_BYTES, PROCESS_BACKEND, TinyModel, random_prompts

PROMPTS = random_prompts(4, seed=21)
COUNT = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
MIXES: list[str | dict[str, float] | None] = [None, "plain", {"all": 0.5, "plain": -0.5}, "all"]
ROOT = Path(__file__).resolve().parents[2]
# The promise is five seconds.
DEATH_SECONDS = 5.0


def adapters(tiny: TinyModel) -> dict[str, Path]:
    return {name: tiny.adapter(name).folder for name in ("plain", "all")}


def pids(llm: LLM) -> list[int]:
    found: list[int] = llm.engine.executor.worker_pids()  # type: ignore[attr-defined]
    return found


def collectives(llm: LLM) -> list[list[tuple[str, int]]]:
    return llm.engine.loop.call(llm.engine.executor.collectives)


def answers(llm: LLM, **options: Any) -> list[list[int]]:
    completions = llm.generate(PROMPTS, GREEDY, **options)
    return [list(completion.token_ids) for completion in completions]


@pytest.fixture(scope="module")
def two(tiny: TinyModel) -> Iterator[LLM]:
    """Two ranks that trace their collectives."""
    with tiny.open_workers(2, adapters=adapters(tiny), trace_collectives=True, prefix_caching=False) as llm:
        yield llm


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_world_size_gives_the_answers_of_transformers(tiny: TinyModel, world: int) -> None:
    sampled = SamplingParams(temperature=1.0, seed=3, top_p=0.9, max_tokens=6, ignore_eos=True)
    short = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with tiny.open(adapters=adapters(tiny)) as alone:
        [expected] = alone.generate(PROMPTS[0], sampled, adapter="plain")
    with tiny.open_workers(world, adapters=adapters(tiny)) as llm:
        assert len(pids(llm)) == len(llm.explain().ranks) == world
        expected_tokens = [tiny.greedy(prompt, COUNT, mix) for prompt, mix in zip(PROMPTS, MIXES, strict=True)]
        assert answers(llm, adapter=MIXES) == expected_tokens
        assert llm.generate(PROMPTS[0], sampled, adapter="plain")[0].token_ids == expected.token_ids
        for change, mix in ((lambda: llm.adapters.merge("plain"), "plain"), (llm.adapters.unmerge, None)):
            change()
            completions = llm.generate(PROMPTS, short)
            assert [list(c.token_ids) for c in completions] == [tiny.greedy(prompt, 4, mix) for prompt in PROMPTS]


def test_adapters_add_no_collective_to_a_step(two: LLM) -> None:
    collectives(two)
    answers(two)
    base = collectives(two)
    answers(two, adapter="all")
    adapted = collectives(two)
    answers(two, adapter=MIXES)
    assert base == adapted == collectives(two)
    assert len(base) == 2
    assert base[0] == base[1]
    assert {kind for kind, _ in base[0]} >= {"all_reduce"}


def test_logprobs_come_from_the_first_rank(two: LLM, tiny: TinyModel) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=3)
    [completion] = two.generate(PROMPTS[0], params)
    expected = tiny.logprobs(PROMPTS[0], completion.token_ids)
    assert completion.logprobs is not None
    for entry, row in zip(completion.logprobs, expected, strict=True):
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=2e-4)


def test_adapters_are_refused_loaded_swapped_and_unloaded_on_all_ranks(
    two: LLM, tiny: TinyModel, tmp_path: Path
) -> None:
    stream = two.stream(PROMPTS[0], ENDLESS, adapter="plain")
    output = list(next(stream).token_ids)
    folder = tmp_path / "bad"
    shutil.copytree(tiny.adapter("ends").folder, folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(AdapterIncompatible, match="bad"):
        two.adapters.load("bad", folder)
    receipt = two.adapters.load("ends", tiny.adapter("ends").folder)
    assert receipt.max_rank == 5
    assert answers(two, adapter="ends") == [tiny.greedy(prompt, COUNT, "ends") for prompt in PROMPTS]
    two.adapters.unload("ends")
    for delta in stream:
        output += delta.token_ids
        if len(output) >= COUNT:
            break
    stream.close()
    assert output[:COUNT] == tiny.greedy(PROMPTS[0], COUNT, "plain")


def test_more_adapters_than_slots_are_swapped_in_on_all_ranks(tiny: TinyModel) -> None:
    names = ["plain", "ends", "subset", "plain", "ends", "subset"]
    folders = {name: tiny.adapter(name).folder for name in names}
    with tiny.open_workers(2, adapters=folders, adapter_slots=2, adapter_rank_rows=16) as llm:
        completions = llm.generate([PROMPTS[0]] * 6, GREEDY, adapter=names)
        assert [list(c.token_ids) for c in completions] == [tiny.greedy(PROMPTS[0], COUNT, name) for name in names]


def test_loading_reports_its_progress(tiny: TinyModel) -> None:
    seen: list[tuple[int, int]] = []
    with tiny.open_workers(load_progress=lambda done, total: seen.append((done, total))):
        pass
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0
    assert {total for _, total in seen} == {seen[-1][1]}


def test_two_engines_and_threads_share_a_process(two: LLM, tiny: TinyModel) -> None:
    def in_a_thread(world: int) -> list[list[int]]:
        with tiny.open_workers(world) as llm:
            return answers(llm)

    expected = [tiny.greedy(prompt, COUNT) for prompt in PROMPTS]
    with ThreadPoolExecutor(3) as pool, tiny.open() as inline:
        futures = [pool.submit(in_a_thread, 1), pool.submit(answers, inline), pool.submit(answers, two)]
        assert [future.result(60) for future in futures] == [expected] * 3


def test_ctrl_c_leaves_the_workers_alone(two: LLM, tiny: TinyModel) -> None:
    for pid in pids(two):
        os.kill(pid, signal.SIGINT)
    assert answers(two) == [tiny.greedy(prompt, COUNT) for prompt in PROMPTS]


# -- deaths ------------------------------------------------------------------------------------------------------------


def dead_engine(llm: LLM, workers: list[int], calls: list[Any]) -> EngineDead:
    """The error of a call that was under way, after checking that every other one gives it too."""
    errors = []
    for call in calls:
        with pytest.raises(EngineDead) as caught:
            call.result(DEATH_SECONDS)
        errors.append(caught.value)
    for later in (
        lambda: llm.generate(PROMPTS[0], GREEDY),
        lambda: llm.stream(PROMPTS[0], GREEDY),
        lambda: llm.adapters.load("x", "/nowhere"),
        llm.explain,
    ):
        with pytest.raises(EngineDead) as caught:
            later()
        errors.append(caught.value)
    health = llm.health()
    assert health.status == "dead"
    assert health.reason == str(errors[0])
    assert wait_gone(workers), "a dead group does not linger until it is closed"
    llm.close()
    llm.close()
    assert not set(children()) & set(workers), "no zombie either"
    assert len({str(error) for error in errors}) == 1
    return errors[0]


@pytest.mark.parametrize(("world", "victim"), [(1, 0), (2, 0), (2, 1)])
def test_a_killed_worker_is_named_and_nobody_hangs(tiny: TinyModel, world: int, victim: int) -> None:
    with tiny.open_workers(world) as llm, ThreadPoolExecutor(3) as pool:
        workers = pids(llm)
        started = threading.Event()

        def stream() -> None:
            for _ in llm.stream(PROMPTS[0], ENDLESS):
                started.set()

        calls = [pool.submit(stream), pool.submit(llm.generate, PROMPTS, ENDLESS)]
        assert started.wait(20)
        os.kill(workers[victim], signal.SIGKILL)
        error = dead_engine(llm, workers, calls)
    cause = error.__cause__
    assert isinstance(cause, WorkerError)
    assert cause.rank == victim
    assert "was killed by SIGKILL" in str(error)


def test_a_worker_killed_while_idle_is_noticed_by_the_next_call(tiny: TinyModel) -> None:
    with tiny.open_workers() as llm:
        [worker] = pids(llm)
        os.kill(worker, signal.SIGKILL)
        assert wait_gone([worker])
        with pytest.raises(EngineDead, match="SIGKILL"):
            llm.generate(PROMPTS[0], GREEDY)


def test_a_silent_worker_is_given_up_after_the_timeout(tiny: TinyModel) -> None:
    with tiny.open_workers(timeout=1.5) as llm, ThreadPoolExecutor(1) as pool:
        workers = pids(llm)
        stream = llm.stream(PROMPTS[0], ENDLESS)
        next(stream)
        os.kill(workers[0], signal.SIGSTOP)
        error = dead_engine(llm, workers, [pool.submit(list, stream)])
    assert isinstance(error.__cause__, CommunicationError)
    assert "ranks [0] did not finish a step within 1.5 s" in str(error)


def test_closing_beside_a_silent_worker_kills_it(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_executor, "CLOSE_SECONDS", 0.2)
    llm = tiny.open_workers()
    workers = pids(llm)
    os.kill(workers[0], signal.SIGSTOP)
    llm.close()
    assert not any(map(is_running, workers))


def test_a_worker_that_fails_to_load_gives_its_error_and_traceback(tiny: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    before = children()
    with pytest.raises(EngineDead, match=r"layers\.1\.mlp\.up_proj") as caught:
        LLM(folder, backend=PROCESS_BACKEND, tensor_parallel_size=2, timeout=60)
    cause = caught.value.__cause__
    assert isinstance(cause, WorkerError)
    assert "Traceback (most recent call last)" in cause.traceback_text
    assert "ModelLoadError" in cause.summary
    assert isinstance(cause.__cause__, ModelLoadError)
    assert children() == before


def test_a_worker_without_room_for_its_cache_says_which_option_to_change(tiny: TinyModel) -> None:
    with pytest.raises(OutOfMemory, match="raise kv_cache_bytes") as caught:
        tiny.open_workers(kv_cache_bytes=BLOCK_BYTES // 100)
    assert isinstance(caught.value.__cause__, WorkerError)
    assert "Traceback" in caught.value.__cause__.traceback_text


def test_after_close_no_process_thread_file_or_folder_is_left(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(threading.enumerate()), children(), open_files()
    llm = tiny.open_workers(2, adapters=adapters(tiny), adapter_slots=1)
    assert len(children()) == len(before[1]) + 2
    assert len(list(tmp_path.iterdir())) == 1
    llm.generate([PROMPTS[0]] * 3, GREEDY, adapter=["plain", "all", None])
    workers = pids(llm)
    open_stream = llm.stream(PROMPTS[0], ENDLESS)
    llm.close()
    assert (set(threading.enumerate()), children(), open_files()) == before
    assert not any(map(is_running, workers))
    assert list(tmp_path.iterdir()) == []
    completion = list(open_stream)[-1].completion
    assert completion is not None
    assert completion.finish_reason == "abort"
    with pytest.raises(EngineDead, match="closed"):
        llm.generate(PROMPTS[0])


def test_an_inline_engine_leaves_no_thread_or_file_either(tiny: TinyModel) -> None:
    with tiny.open():
        pass
    before = set(threading.enumerate()), children(), open_files()
    folders = {name: tiny.adapter(name).folder for name in ("plain", "ends")}
    with tiny.open(adapters=folders, adapter_slots=1) as llm:
        llm.generate([PROMPTS[0]] * 3, GREEDY, adapter=["plain", "ends", None])
    llm.close()
    assert (set(threading.enumerate()), children(), open_files()) == before


# -- other people's programs -------------------------------------------------------------------------------------------


def script(tiny: TinyModel, body: str) -> str:
    return textwrap.dedent(f"""
        import polyaccel
        llm = polyaccel.LLM(
            {str(tiny.folder)!r}, backend={PROCESS_BACKEND!r}, tensor_parallel_size=2, dtype="float32", threads=1,
            max_num_seqs=4, kv_cache_bytes=1 << 20,
        )
        print(*llm.engine.executor.worker_pids(), flush=True)
        greedy = polyaccel.SamplingParams(temperature=0.0, max_tokens={COUNT}, ignore_eos=True)
    """) + textwrap.dedent(body)


def test_a_script_without_a_main_guard_works_and_ends(tiny: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "unguarded.py"
    body = f"""
        print(*llm.generate({PROMPTS[0]}, greedy)[0].token_ids, flush=True)
        unread = llm.stream({PROMPTS[0]}, polyaccel.SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True))
        # It ends without closing anything.
    """
    file.write_text(script(tiny, body))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, timeout=100, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    workers, output = done.stdout.splitlines()
    assert [int(token) for token in output.split()] == tiny.greedy(PROMPTS[0], COUNT)
    assert wait_gone(map(int, workers.split()))


def test_workers_end_when_their_parent_is_killed_in_the_middle_of_a_step(tiny: TinyModel) -> None:
    body = f"""
        endless = polyaccel.SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
        for delta in llm.stream({PROMPTS[0]}, endless):
            print("token", flush=True)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", script(tiny, body)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert parent.stdout.readline() == "token\n"
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_gone(workers)
