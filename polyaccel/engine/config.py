"""Everything that is decided when an engine starts. One frozen value, sent to every worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from polyaccel.backend.errors import ConfigurationError
from polyaccel.backend.plan import Policy

DType = Literal["auto", "float32", "bfloat16", "float16"]
ExecutorKind = Literal["auto", "inline", "process"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The options of :class:`polyaccel.LLM`, validated.

    Attributes:
        model: folder, .gguf file or hub id in the local cache.
        backend: name of an installed backend, or "auto".
        tensor_parallel_size: ranks that share every layer.
        layer_devices: device index of each layer inside one process; None: all on one device.
        dtype: of weights and activations; "auto" takes the checkpoint's (float32 for GGUF on the CPU).
        max_model_len: longest sequence in tokens; None: what the model allows.
        max_num_seqs: sequences that run at once.
        max_batched_tokens: token budget of one step.
        memory_fraction: share of free device memory that the KV cache may take.
        kv_cache_bytes: exact size of the KV cache instead.
        prefix_caching: reuse the KV blocks of equal prefixes.
        overlap: prepare a step while the one before runs.
        graphs: capture decode steps where the backend can.
        adapter_slots: adapters resident on the device at once; 0 switches adapters off.
        adapter_rank_rows: sum of the ranks of resident adapters.
        batch_invariant: a request's tokens and log-probabilities have the same bits whatever else is served and however
            its prompt is cut into steps; slower, and refused by backends that cannot promise it.
        executor: "inline" (this process), "process" (one process a rank), or "auto".
        policy: "strict", "warn" or "allow": what happens when a critical operator has only a composite.
        seed: of the generator that seeds requests without a seed of their own.
        threads: CPU threads of each worker; None: an equal share.
        timeout: seconds without an answer after which a worker counts as dead.
    """

    model: str
    backend: str = "auto"
    tensor_parallel_size: int = 1
    layer_devices: tuple[int, ...] | None = None
    dtype: DType = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_batched_tokens: int = 2048
    memory_fraction: float = 0.9
    kv_cache_bytes: int | None = None
    prefix_caching: bool = True
    overlap: bool = True
    graphs: bool = True
    adapter_slots: int = 8
    adapter_rank_rows: int = 512
    batch_invariant: bool = False
    executor: ExecutorKind = "auto"
    policy: Policy = "warn"
    seed: int = 0
    threads: int | None = None
    timeout: float = 300.0
    trace_collectives: bool = False

    def __post_init__(self) -> None:
        _at_least("tensor_parallel_size", self.tensor_parallel_size, 1)
        _at_least("max_num_seqs", self.max_num_seqs, 1)
        _at_least("max_batched_tokens", self.max_batched_tokens, 1)
        _at_least("adapter_slots", self.adapter_slots, 0)
        _at_least("adapter_rank_rows", self.adapter_rank_rows, 0)
        if self.max_model_len is not None:
            _at_least("max_model_len", self.max_model_len, 1)
        if self.threads is not None:
            _at_least("threads", self.threads, 1)
        if self.kv_cache_bytes is not None:
            _at_least("kv_cache_bytes", self.kv_cache_bytes, 1)
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigurationError(f"memory_fraction={self.memory_fraction!r} is not in (0, 1]")
        if not self.timeout > 0:
            raise ConfigurationError(f"timeout={self.timeout!r} must be a positive number of seconds")
        _one_of("dtype", self.dtype, get_args(DType))
        _one_of("executor", self.executor, get_args(ExecutorKind))
        _one_of("policy", self.policy, get_args(Policy))
        if self.layer_devices is not None and self.tensor_parallel_size > 1:
            raise ConfigurationError("layer_devices spreads layers inside one process; it needs tensor_parallel_size=1")
        if self.executor == "inline" and self.tensor_parallel_size > 1:
            raise ConfigurationError(
                f"executor='inline' runs one rank, but tensor_parallel_size={self.tensor_parallel_size}; use "
                f"executor='process'"
            )

    @property
    def adapters_enabled(self) -> bool:
        return self.adapter_slots > 0 and self.adapter_rank_rows > 0


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name}={value!r} must be an integer of at least {least}")


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ConfigurationError(f"{name}={value!r}; accepted are {', '.join(map(repr, accepted))}")
