"""Rotary position embedding: which frequencies a model rotates with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from polyaccel.backend.errors import ModelLoadError
from polyaccel.models.config_values import ConfigValues

RopeScaling = Literal["none", "linear", "llama3", "yarn", "factors"]
_SUPPORTED = ("default", "linear", "llama3", "yarn", "factors")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary frequencies of one model.

    ``rotary_dim``: how many of a head's elements are rotated, from its first on. ``style``: "half" pairs element i with
    i + rotary_dim / 2, "interleaved" pairs neighbours. ``attention_factor`` multiplies both cos and sin.
    The other fields are parameters of ``scaling`` and unused elsewhere: linear and yarn (arXiv:2309.00071) use
    ``factor``; llama3 ``factor``, ``low_freq_factor``, ``high_freq_factor``; yarn ``beta_fast``, ``beta_slow``,
    ``truncate``; both ``original_max_position_embeddings``; "factors" divides frequency i by ``factors[i]`` (the
    ``rope_freqs`` tensor of GGUF files).
    """

    theta: float
    rotary_dim: int
    style: Literal["half", "interleaved"] = "half"
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    @classmethod
    def from_hf(cls, config: Mapping[str, object], *, head_dim: int, default_theta: float) -> RopeConfig:
        """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before).

        Raises ModelLoadError naming the key for values out of range and for kinds that are not supported.
        """
        top = ConfigValues(config)
        values = _rope_values(config)
        kind = values.text("rope_type", values.text("type", "default"))
        if kind not in _SUPPORTED:
            raise ModelLoadError(f"rope_type {kind[:60]!r} is not supported; supported are {', '.join(_SUPPORTED)}")
        theta = values.number("rope_theta", top.number("rope_theta", default_theta, 1.0, 1e12), 1.0, 1e12)
        share = values.number("partial_rotary_factor", top.number("partial_rotary_factor", 1.0, 0.0, 1.0), 0.0, 1.0)
        rotary_dim = int(head_dim * share)
        if rotary_dim < 2 or rotary_dim % 2:
            raise ModelLoadError(
                f"{rotary_dim} of a head's {head_dim} elements are rotated; expected a positive even number"
            )
        if kind == "default":
            return cls(theta=theta, rotary_dim=rotary_dim)
        if kind == "factors":
            factors = values.numbers("factors", 1e-6, 1e6)
            if len(factors) != rotary_dim // 2:
                raise ModelLoadError(f"rope 'factors' has {len(factors)} values, expected {rotary_dim // 2}")
            return cls(theta=theta, rotary_dim=rotary_dim, scaling="factors", factors=factors)
        longest = top.integer("max_position_embeddings", 0, 0, 2**31)
        # NOTE: some models state the original length beside the rope parameters, and then that one counts.
        original = values.integer("original_max_position_embeddings", longest, 0, 2**31)
        original = top.integer("original_max_position_embeddings", original, 0, 2**31)
        if kind != "linear" and original < 1:
            raise ModelLoadError(
                f"rope_type {kind!r} needs a positive 'original_max_position_embeddings', got {original}"
            )
        if kind == "yarn" and values.is_missing("factor"):
            factor = longest / original
        else:
            factor = values.number("factor", None, 1e-6, 1e6)
        if kind == "linear":
            return cls(theta=theta, rotary_dim=rotary_dim, scaling="linear", factor=factor)
        if kind == "llama3":
            low = values.number("low_freq_factor", None, 1e-6, 1e6)
            high = values.number("high_freq_factor", None, 1e-6, 1e6)
            if high <= low:
                raise ModelLoadError(f"rope 'high_freq_factor' {high} must be greater than 'low_freq_factor' {low}")
            return cls(
                theta=theta,
                rotary_dim=rotary_dim,
                scaling="llama3",
                factor=factor,
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_position_embeddings=original,
            )
        if theta == 1.0:
            raise ModelLoadError("rope_type 'yarn' needs a 'rope_theta' greater than 1")
        return cls(
            theta=theta,
            rotary_dim=rotary_dim,
            scaling="yarn",
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=values.number("beta_fast", 0.0, 0.0, 1e6) or 32.0,
            beta_slow=values.number("beta_slow", 0.0, 0.0, 1e6) or 1.0,
            truncate=values.flag("truncate", True),
            attention_factor=_yarn_attention_factor(values, factor),
        )

    def inv_freq(self) -> npt.NDArray[np.float64]:
        """Radians per position of each rotated pair: [rotary_dim / 2], float64."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim
        base: npt.NDArray[np.float64] = self.theta**-exponents
        if self.scaling == "linear":
            return base / self.factor
        if self.scaling == "factors":
            return base / np.asarray(self.factors, dtype=np.float64)
        if self.scaling == "llama3":
            return self._llama3(base)
        if self.scaling == "yarn":
            return self._yarn(base)
        return base

    def _llama3(self, base: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        # turns = full rotations within the original context: many keep their frequency, few are slowed down by factor
        turns = self.original_max_position_embeddings * base / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        scaled: npt.NDArray[np.float64] = base * (kept + (1.0 - kept) / self.factor)
        return scaled

    def _yarn(self, base: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        def index_of(turns: float) -> float:
            wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return self.rotary_dim * math.log(wavelength) / (2 * math.log(self.theta))

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = float(math.floor(low)), float(math.ceil(high))
        low, high = max(low, 0.0), min(high, self.rotary_dim - 1.0)
        span = high - low if high != low else 0.001
        slowed = np.clip((np.arange(self.rotary_dim // 2) - low) / span, 0.0, 1.0)
        scaled: npt.NDArray[np.float64] = base * (1.0 - slowed + slowed / self.factor)
        return scaled


def _rope_values(config: Mapping[str, object]) -> ConfigValues:
    for key in ("rope_parameters", "rope_scaling"):
        raw = config.get(key)
        if raw is None:
            continue
        if not isinstance(raw, Mapping):
            raise ModelLoadError(f"config {key!r} is {type(raw).__name__}, expected an object")
        if any(isinstance(value, Mapping) for value in raw.values()):
            raise ModelLoadError(f"config {key!r} differs between layer types, which is not supported")
        return ConfigValues(raw, where=f"{key}.")
    return ConfigValues({}, where="rope_parameters.")


def _yarn_attention_factor(values: ConfigValues, factor: float) -> float:
    given = values.number("attention_factor", 0.0, 0.0, 1e6)
    if not values.is_missing("attention_factor"):
        return given

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    mscale, all_dim = values.number("mscale", 0.0, 0.0, 1e6), values.number("mscale_all_dim", 0.0, 0.0, 1e6)
    return magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
