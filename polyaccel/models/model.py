"""A model as the engine sees it: sites to plan, weights to load, modules that take adapters, one call a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from polyaccel.backend.backend import Backend
from polyaccel.backend.communicator import Communicator
from polyaccel.backend.device import Device
from polyaccel.backend.errors import ConfigurationError
from polyaccel.backend.kv_cache import KVCache, KVSpec
from polyaccel.backend.plan import Plan, SiteRequest
from polyaccel.backend.spec import FLOATS
from polyaccel.backend.step import Step
from polyaccel.backend.weight import Weight
from polyaccel.lora.target import AdapterTarget
from polyaccel.models.config import ModelConfig
from polyaccel.models.loading import Progress
from polyaccel.weights.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How one rank builds its part of a model.

    ``devices`` has one device a layer (usually the same for all); ``dtype`` is that of weights and activations;
    ``rank_rows`` is the room for adapters' rank rows at every site (0: no adapters); positions are below
    ``max_positions``.

    Raises:
        ConfigurationError: values that do not fit together.
    """

    config: ModelConfig
    backend: Backend
    devices: tuple[Device, ...]
    rank: int
    world_size: int
    dtype: torch.dtype
    rank_rows: int
    max_positions: int

    def __post_init__(self) -> None:
        if len(self.devices) != self.config.num_layers:
            raise ConfigurationError(
                f"layer_devices names {len(self.devices)} devices, the model has {self.config.num_layers} layers; "
                "name one a layer"
            )
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ConfigurationError(
                f"rank {self.rank} of a world of {self.world_size}: the rank must be in 0..world_size-1"
            )
        if self.dtype not in FLOATS:
            raise ConfigurationError(f"dtype {self.dtype} is not supported; use float32, bfloat16 or float16")
        if self.rank_rows < 0:
            raise ConfigurationError(f"rank_rows is {self.rank_rows}; it must be 0 or more")
        if self.max_positions < 1:
            raise ConfigurationError(f"max_positions is {self.max_positions}; it must be 1 or more")


class Model(ABC):
    """One rank's part of a model.

    Life: built (nothing allocated), loaded, bound to a plan and a KV cache, stepped. Layers may lie on several devices
    of one backend.
    """

    options: ModelOptions
    vocabulary: int
    """Ids of the model; the width of the logits."""

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def devices(self) -> tuple[Device, ...]:
        """The distinct devices, in the order in which layers use them."""

    @abstractmethod
    def requests(self) -> list[SiteRequest]:
        """Every place where an operator or station is called, with its dimensions on this rank. Touches no device."""

    @abstractmethod
    def targets(self, device_index: int | None = None) -> tuple[AdapterTarget, ...]:
        """Every module that takes adapters, as this rank holds it, or those of one device. Touches no device.

        An adapter store holds the sites of one device only; an adapter is matched with all targets and packed once for
        each device with that device's.
        """

    # -- weights -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def weights(self, device_index: int | None = None) -> dict[str, Weight]:
        """The weights by site: all of them, or those of one device. Allocates them at the first call.

        Raises:
            OutOfMemory: from allocating.
        """

    @abstractmethod
    def load(self, checkpoint: Checkpoint, progress: Progress | None = None) -> None:
        """Read this rank's part of the checkpoint and seal every weight.

        ``progress`` is called with (bytes read, bytes to read) of the files. Names, shapes and dtypes of all tensors
        are checked before the first is read.

        Raises:
            ModelLoadError: tensors that are missing, unknown, of another shape or dtype, all of them named.
            OutOfMemory: from allocating or packing.
        """

    @abstractmethod
    def reload(self, checkpoint: Checkpoint, site: str) -> None:
        """Write one site's weight anew, bit for bit as :meth:`load` did: undoes a merged adapter.

        A site that shares its values with another (a tied lm_head) is rewritten through that one.

        Raises:
            ConfigurationError: no such site.
            ModelLoadError: the checkpoint does not hold it as before.
        """

    # -- stepping ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def bind(self, plan: Plan, comm: Communicator) -> None:
        """Use the plan's choices, and this group of ranks, from now on."""

    @abstractmethod
    def kv_spec(self, blocks: int, block_size: int, dtype: torch.dtype, device_index: int | None = None) -> KVSpec:
        """The KV cache of one device, for the layers that lie on it.

        Raises:
            ConfigurationError: no layer lies on the device, or it was left out with several devices in use.
        """

    @abstractmethod
    def bind_kv(self, kv: KVCache | Mapping[int, KVCache]) -> None:
        """Use this cache from now on; with several devices, one cache by device index.

        Raises:
            ConfigurationError: a device has none.
        """

    @abstractmethod
    def forward(self, steps: Mapping[int, Step]) -> torch.Tensor:
        """Run one step: ``steps`` holds the same step on each device, by device index.

        Returns the logits ``[R, vocabulary]`` of the step's logits rows in the model's dtype, on the last layer's
        device, equal on all ranks. Asynchronous: nothing is read back. Calls operators and takes views, nothing else;
        hidden states are copied where the device changes.
        """
