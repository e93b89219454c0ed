"""Which class builds which family."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel.models.config import Family
from polyaccel.models.decoder import DecoderModel
from polyaccel.models.llama import LlamaModel
from polyaccel.models.mixtral import MixtralModel
from polyaccel.models.model import Model, ModelOptions

FAMILIES: Mapping[Family, type[DecoderModel]] = MappingProxyType(
    {"llama": LlamaModel, "mistral": LlamaModel, "qwen2": LlamaModel, "qwen3": LlamaModel, "mixtral": MixtralModel}
)


def build_model(options: ModelOptions) -> Model:
    """This rank's part of the model that the configuration describes. Allocates nothing.

    Raises:
        ConfigurationError: more ranks than query heads.
    """
    return FAMILIES[options.config.family](options)
