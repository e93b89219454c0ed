"""PEFT's ``adapter_config.json``, read without PEFT.

Fields that only say how an adapter was trained or initialised are passed over; fields that change what must be computed
are used or refused by name; a field that is not known here is refused unless it is empty. Which modules are adapted is
read from the tensors themselves, so that the selection fields (``target_modules``, ``layers_to_transform``,
``exclude_modules``) are information only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from polyaccel.backend.errors import AdapterIncompatible
from polyaccel.lora.numbers import MAX_RANK, RankNumbers
from polyaccel.lora.pattern import PatternTable
from polyaccel.weights.json_file import read_json_object

# Field -> what it is called and what can be done. Refused when the field is set to anything but empty or false.
_REFUSED: dict[str, str] = {
    "modules_to_save": "modules_to_save (whole trained modules); train lm_head or embed_tokens as LoRA targets instead",
    "use_dora": "DoRA (use_dora); merge it into the base with PEFT's merge_and_unload",
    "alora_invocation_tokens": "aLoRA (alora_invocation_tokens)",
    "lora_bias": "LoRA bias (lora_bias)",
    "trainable_token_indices": "trainable_token_indices",
    "layer_replication": "layer_replication (the adapter is for a model with repeated layers)",
    "use_qalora": "QA-LoRA (use_qalora)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "arrow_config": "Arrow routing (arrow_config)",
    "kasa_config": "KaSA (kasa_config), which changes the base weights",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "velora_config": "VeLoRA (velora_config)",
    "megatron_config": "Megatron layers (megatron_config)",
}

# Initialisations that leave the base weights and the adapter's meaning alone.
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")

_PASSED_OVER = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        # Which way round the base stores its weight; A and B are saved alike either way.
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)

_READ = frozenset(
    {
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "init_lora_weights",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "use_rslora",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What of ``adapter_config.json`` inference needs."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]
    target_modules: tuple[str, ...] | str | None
    target_parameters: tuple[str, ...]
    ensure_weight_tying: bool

    @classmethod
    def read(cls, path: Path) -> AdapterConfig:
        """Read the file.

        Raises:
            AdapterIncompatible: a missing, oversized or malformed file, or see :meth:`parse`.
        """
        return cls.parse(read_json_object(path, AdapterIncompatible), path)

    @classmethod
    def parse(cls, mapping: Mapping[str, object], path: Path | str) -> AdapterConfig:
        """Check and read the fields; ``path`` is only for messages.

        Raises:
            AdapterIncompatible: another PEFT method, a refused or unknown feature, a value of the wrong type or range.
        """
        try:
            _refuse_features(mapping)
            r = _whole(mapping.get("r", 8), "r", MAX_RANK)
            ranks = {
                key: _whole(value, f"rank_pattern[{key!r}]", MAX_RANK * 4096)
                for key, value in _object(mapping, "rank_pattern").items()
            }
            alphas = {
                key: _number(value, f"alpha_pattern[{key!r}]")
                for key, value in _object(mapping, "alpha_pattern").items()
            }
            target_modules = mapping.get("target_modules")
            return cls(
                r=r,
                lora_alpha=_number(mapping.get("lora_alpha", 8), "lora_alpha"),
                use_rslora=_flag(mapping, "use_rslora"),
                rank_pattern=PatternTable(ranks, "rank_pattern"),
                alpha_pattern=PatternTable(alphas, "alpha_pattern"),
                target_modules=target_modules if isinstance(target_modules, str) else _names(mapping, "target_modules"),
                target_parameters=_names(mapping, "target_parameters") or (),
                ensure_weight_tying=_flag(mapping, "ensure_weight_tying"),
            )
        except AdapterIncompatible as error:
            raise AdapterIncompatible(f"{path}: {error}") from error

    def rank_of(self, name: str) -> int:
        """Configured rank of a module (or parameter) of this name."""
        rank = self.rank_pattern.get(name)
        return self.r if rank is None else rank

    def numbers(self, name: str, true_rank: int) -> RankNumbers:
        """The named numbers of a module whose tensors have ``true_rank``.

        Raises:
            AdapterIncompatible: tensors and configuration disagree on the rank, or the rank is outside 1..512.
        """
        configured = self.rank_of(name)
        if configured != true_rank:
            raise AdapterIncompatible(
                f"module {name!r}: its tensors have rank {true_rank} but adapter_config.json says {configured}; "
                "the scale would be wrong, so one of the two must be corrected"
            )
        alpha = self.alpha_pattern.get(name)
        return RankNumbers.of(
            alpha=self.lora_alpha if alpha is None else alpha, true_rank=true_rank, use_rslora=self.use_rslora
        )


def _refuse_features(mapping: Mapping[str, object]) -> None:
    method = mapping.get("peft_type")
    if method != "LORA":
        raise AdapterIncompatible(f"peft_type is {method!r}; only 'LORA' adapters are supported")
    for field, meaning in _REFUSED.items():
        if mapping.get(field):
            raise AdapterIncompatible(f"the adapter uses {meaning}; this is not supported")
    bias = mapping.get("bias", "none")
    if bias not in ("none", None):
        raise AdapterIncompatible(f"the adapter trained biases (bias={bias!r}); only bias='none' is supported")
    init = mapping.get("init_lora_weights", True)
    if init is not None and not isinstance(init, bool) and init not in _HARMLESS_INITS:
        raise AdapterIncompatible(
            f"the adapter was initialised with init_lora_weights={init!r}, which changes the base weights it belongs "
            "to; convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for field, value in mapping.items():
        if field not in _READ and field not in _PASSED_OVER and field not in _REFUSED and value:
            raise AdapterIncompatible(
                f"field {field!r} (value {value!r:.80}) is not known and may change the result; "
                "if it does not, remove it"
            )


def _whole(value: object, field: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise AdapterIncompatible(f"{field} is {value!r:.80}; a whole number from 1 to {most} is expected")
    return value


def _number(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AdapterIncompatible(f"{field} is {value!r:.80}; a number is expected")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise AdapterIncompatible(f"{field} is {value!r:.80}; a finite number is expected")
    return number


def _flag(mapping: Mapping[str, object], field: str) -> bool:
    value = mapping.get(field)
    if value is not None and not isinstance(value, bool):
        raise AdapterIncompatible(f"{field} is {value!r:.80}; true or false is expected")
    return bool(value)


def _object(mapping: Mapping[str, object], field: str) -> dict[str, object]:
    value = mapping.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterIncompatible(f"{field} is {value!r:.80}; an object is expected")
    return value


def _names(mapping: Mapping[str, object], field: str) -> tuple[str, ...] | None:
    value = mapping.get(field)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise AdapterIncompatible(f"{field} is {value!r:.80}; a list of names is expected")
    return tuple(value)
