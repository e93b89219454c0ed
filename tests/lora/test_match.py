from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyaccel.backend.errors import AdapterIncompatible
from polyaccel.lora.adapter_file import AdapterFile
from polyaccel.lora.match import match_adapter
from polyaccel.lora.target import AdapterTarget
from polyaccel.parallel.cut import Rows
from tests.lora.folders import PREFIX, llama_targets, random_matrices, write_folder

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


def opened(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> AdapterFile:
    return AdapterFile.open(write_folder(folder, tensors, **config))


def test_pairs_come_in_the_order_of_the_targets_with_one_receipt_line_each(tmp_path: Path) -> None:
    targets = llama_targets()
    matched = match_adapter(opened(tmp_path, random_matrices(8, seed=1)), targets)
    order = [target.module for target in targets if target.layer != 1]
    assert [target.module for target, _ in matched.pairs] == order
    assert [entry.module for entry in matched.entries] == order
    assert all(entry.applied and entry.numbers and entry.numbers.scale == 2.0 for entry in matched.entries)
    assert matched.max_rank == 8


def test_an_unmatched_module_is_an_error_that_names_it_and_the_closest(tmp_path: Path) -> None:
    tensors = {
        name.replace("layers.0.self_attn.q_proj", "layers.7.self_attn.q_proj"): tensor
        for name, tensor in random_matrices(8, seed=2).items()
    }
    file = opened(tmp_path, tensors)
    with pytest.raises(AdapterIncompatible, match="no place") as caught:
        match_adapter(file, llama_targets())
    assert "model.layers.7.self_attn.q_proj (close: model.layers." in str(caught.value)
    matched = match_adapter(file, llama_targets(), allow_unmatched=True)
    (dropped,) = [entry for entry in matched.entries if not entry.applied]
    assert (dropped.module, dropped.reason) == ("model.layers.7.self_attn.q_proj", "the model has no such module")


def test_a_whole_weight_in_the_file_is_an_error_unless_allowed(tmp_path: Path) -> None:
    name = f"{PREFIX}model.norm.weight"
    file = opened(tmp_path, random_matrices(8, seed=3) | {name: torch.ones(72)})
    with pytest.raises(AdapterIncompatible, match=r"model\.norm\.weight"):
        match_adapter(file, llama_targets())
    matched = match_adapter(file, llama_targets(), allow_unmatched=True)
    assert [entry.module for entry in matched.entries if not entry.applied] == [name]


def test_many_unmatched_modules_are_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(100):
        tensors[f"other.{layer}.x.lora_A.weight"] = torch.ones(8, 4)
        tensors[f"other.{layer}.x.lora_B.weight"] = torch.ones(4, 8)
    with pytest.raises(AdapterIncompatible, match=r"100 modules(.|\n)*and 92 more"):
        match_adapter(opened(tmp_path, tensors), llama_targets())


def test_an_adapter_of_another_model_is_told_by_its_shapes(tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.ones(8, 64), f"{Q}.lora_B.weight": torch.ones(64, 8)}
    with pytest.raises(AdapterIncompatible, match=r"q_proj.*\[64, 64\].*\[72, 72\]; was it made for another model"):
        match_adapter(opened(tmp_path, tensors), llama_targets(), allow_unmatched=True, allow_no_effect=True)


@pytest.mark.parametrize("zeroed", ["lora_A", "lora_B"])
def test_an_adapter_of_zeros_is_an_error_unless_allowed(tmp_path: Path, zeroed: str) -> None:
    tensors = {
        name: torch.zeros_like(tensor) if zeroed in name.replace("embedding_", "") else tensor
        for name, tensor in random_matrices(8, seed=4).items()
    }
    file = opened(tmp_path, tensors)
    with pytest.raises(AdapterIncompatible, match="no effect"):
        match_adapter(file, llama_targets())
    entries = match_adapter(file, llama_targets(), allow_no_effect=True).entries
    assert {entry.reason for entry in entries} == {"A, B or the scale is zero"}


def test_a_scale_of_zero_has_no_effect(tmp_path: Path) -> None:
    with pytest.raises(AdapterIncompatible, match="no effect"):
        match_adapter(opened(tmp_path, random_matrices(8, seed=5), lora_alpha=0), llama_targets())


def test_an_adapter_that_matches_nothing_has_no_effect_even_where_unmatched_is_allowed(tmp_path: Path) -> None:
    tensors = {"x.lora_A.weight": torch.ones(8, 4), "x.lora_B.weight": torch.ones(4, 8)}
    file = opened(tmp_path, tensors)
    with pytest.raises(AdapterIncompatible, match="none of its tensors has a place"):
        match_adapter(file, llama_targets(), allow_unmatched=True)
    assert match_adapter(file, llama_targets(), allow_unmatched=True, allow_no_effect=True).pairs == ()


def test_one_zero_module_is_applied_and_remarked(tmp_path: Path) -> None:
    tensors = random_matrices(8, seed=6)
    tensors[f"{Q}.lora_B.weight"] = torch.zeros(72, 8)
    entries = match_adapter(opened(tmp_path, tensors), llama_targets()).entries
    assert [entry.module for entry in entries if entry.reason] == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_single_value_that_is_not_finite_is_an_error(
    tmp_path: Path, bad: float, matrix: str, dtype: torch.dtype
) -> None:
    tensors = random_matrices(8, seed=7, dtype=dtype)
    tensors[f"{Q}.{matrix}.weight"][3, 5] = bad
    with pytest.raises(AdapterIncompatible, match=rf"q_proj\.{matrix}.*infinite or not a number"):
        match_adapter(opened(tmp_path, tensors), llama_targets(), allow_no_effect=True)


def test_a_resized_vocabulary_is_refused_by_the_saved_base_weight(tmp_path: Path) -> None:
    tensors = random_matrices(8, seed=8)
    tensors[f"{PREFIX}model.embed_tokens.base_layer.weight"] = torch.ones(51, 72)
    with pytest.raises(AdapterIncompatible, match=r"\[51, 72\].*resized vocabulary"):
        match_adapter(opened(tmp_path, tensors), llama_targets())


def test_a_linear_adapter_on_an_embedding_is_refused(tmp_path: Path) -> None:
    stem = f"{PREFIX}model.embed_tokens"
    tensors = {f"{stem}.lora_A.weight": torch.ones(8, 50), f"{stem}.lora_B.weight": torch.ones(72, 8)}
    with pytest.raises(AdapterIncompatible, match="embedding module"):
        match_adapter(opened(tmp_path, tensors), llama_targets())


def expert_target(module: str, expert: int) -> AdapterTarget:
    return AdapterTarget(
        module=module,
        site="experts",
        slice=0,
        expert=expert,
        in_features=6,
        out_features=4,
        out_rows=Rows.whole(4),
        in_cols=Rows.whole(6),
        layer=0,
    )


@pytest.mark.parametrize("parent", ["mlp", "block_sparse_moe"])
@pytest.mark.parametrize(("ours", "theirs"), [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")])
@pytest.mark.parametrize("swapped", [False, True])
def test_expert_modules_are_found_under_every_name_they_have_had(
    tmp_path: Path, parent: str, ours: str, theirs: str, swapped: bool
) -> None:
    in_file, in_model = (ours, theirs) if swapped else (theirs, ours)
    stem = f"{PREFIX}model.layers.0.{parent}.experts.1.{in_file}"
    tensors = {f"{stem}.lora_A.weight": torch.ones(8, 6), f"{stem}.lora_B.weight": torch.ones(4, 8)}
    targets = [expert_target(f"model.layers.0.block_sparse_moe.experts.{e}.{in_model}", e) for e in (0, 1)]
    matched = match_adapter(opened(tmp_path, tensors), targets)
    assert [(target.expert, pair.expert) for target, pair in matched.pairs] == [(1, 1)]


def test_two_modules_of_the_file_cannot_fill_one_target(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}{prefix}layers.0.self_attn.q_proj.lora_{matrix}.weight": torch.ones(shape)
        for prefix in ("", "model.")
        for matrix, shape in (("A", (8, 72)), ("B", (72, 8)))
    }
    with pytest.raises(AdapterIncompatible, match="both adapt"):
        match_adapter(opened(tmp_path, tensors), llama_targets())


def test_one_module_may_fill_several_slices(tmp_path: Path) -> None:
    stem = f"{PREFIX}model.layers.0.mlp.gate_up_proj"
    tensors = {f"{stem}.lora_A.weight": torch.ones(8, 6), f"{stem}.lora_B.weight": torch.ones(10, 8)}
    targets = [
        AdapterTarget(
            module="model.layers.0.mlp.gate_up_proj",
            site="layers.0.gate_up",
            slice=index,
            in_features=6,
            out_features=10,
            out_rows=Rows.span(5 * index, 5 * index + 5),
            in_cols=Rows.whole(6),
            layer=0,
        )
        for index in (0, 1)
    ]
    matched = match_adapter(opened(tmp_path, tensors), targets)
    assert [target.slice for target, _ in matched.pairs] == [0, 1]
