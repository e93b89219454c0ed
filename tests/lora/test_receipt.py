from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from polyaccel.lora.adapter_file import AdapterFile
from polyaccel.lora.match import match_adapter
from polyaccel.lora.receipt import AdapterReceipt, StageSeconds
from tests.lora.folders import llama_targets, random_matrices, write_folder


def receipt(folder: Path) -> AdapterReceipt:
    tensors = random_matrices(4, seed=1, layers=2)
    tensors |= {"other.lora_A.weight": torch.ones(4, 4), "other.lora_B.weight": torch.ones(4, 4)}
    file = AdapterFile.open(write_folder(folder, tensors, r=4, alpha_pattern={"k_proj": 6}))
    matched = match_adapter(file, llama_targets(), allow_unmatched=True)
    return AdapterReceipt(
        name="pirate",
        path=str(folder),
        generation=3,
        entries=matched.entries,
        notes=("a remark",),
        file_bytes=file.nbytes,
        packed_bytes=1000,
        seconds=StageSeconds(read=0.001, pack=0.002, copy=0.003, total=0.007),
    ).with_implementations({"layers.0.qkv": "fused", "layers.1.qkv": "fused", "lm_head": "composite"})


def test_the_table_has_one_line_for_all_layers_that_share_everything(tmp_path: Path) -> None:
    lines = str(receipt(tmp_path)).splitlines()
    (q,) = [line for line in lines if "q_proj" in line]
    assert q.split() == ["model.layers.*.self_attn.q_proj", "0-1", "2", "16", "4/4/4", "4", "applied", "fused"]
    (k,) = [line for line in lines if "k_proj" in line]
    assert k.split()[3:6] == ["6", "4/4/4", "1.5"]
    (dropped,) = [line for line in lines if "dropped" in line and "other" in line]
    assert dropped.endswith("the model has no such module")
    assert lines[0].endswith("16 modules applied, 1 dropped")
    assert "pack 2.0 ms" in lines[1]
    assert lines[-1] == "  note: a remark"


def test_the_dictionary_is_plain_json_with_every_module_and_number(tmp_path: Path) -> None:
    made = receipt(tmp_path)
    values = json.loads(json.dumps(made.to_dict()))
    assert len(values["modules"]) == len(made.entries) == 17
    k = next(module for module in values["modules"] if module["module"].endswith("k_proj"))
    assert (k["alpha"], k["true_rank"], k["padded_rank"], k["shard_rank"], k["scale"]) == (6, 4, 4, 4, 1.5)
    assert values["generation"] == 3
    assert values["seconds"]["total"] == 0.007
    assert values["implementations"]["lm_head"] == "composite"


def test_layers_that_are_not_adjacent_are_shown_as_spans(tmp_path: Path) -> None:
    made = receipt(tmp_path)
    entries = [entry for entry in made.entries if entry.module.endswith("0.self_attn.q_proj")]
    spread = tuple(
        replace(entries[0], layer=layer, module=f"model.layers.{layer}.self_attn.q_proj")
        for layer in (0, 1, 2, 5, 7, 8)
    )
    (line,) = [line for line in str(replace(made, entries=spread)).splitlines() if "q_proj" in line]
    assert "0-2,5,7-8" in line


def test_the_largest_applied_rank_is_told(tmp_path: Path) -> None:
    assert receipt(tmp_path).max_rank == 4
    assert AdapterReceipt(name="x", path="", generation=1, entries=()).max_rank == 0
