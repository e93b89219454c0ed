"""Bugs that one card shows: wrong attributes, layouts, lengths and places. Found by the suite's cases."""

from __future__ import annotations

from tests.npu.mutants.mutant import ByTest, Edit, Mutant, OnCard

NORM, ATTENTION = OnCard(("rms_norm",)), OnCard(("paged_attention",))
SGMV, ROTARY, WRITE = OnCard(("sgmv",)), OnCard(("rotary_embedding",)), OnCard(("write_kv_cache",))

KERNELS = "tests/npu/test_vllm_sgmv.py"


def _one(name: str, what: str, file: str, old: str, new: str, killer: OnCard) -> Mutant:
    return Mutant(name, what, (Edit(file, old, new),), killer)


OPERATORS: tuple[Mutant, ...] = (
    _one(
        "norm.eps",
        "npu_rms_norm gets its own default for eps.",
        "operators.py",
        "runtime.ops().npu_rms_norm, x, weight, eps)",
        "runtime.ops().npu_rms_norm, x, weight)",
        NORM,
    ),
    _one(
        "norm.residual_not_summed",
        "add_rms_norm hands on the residual that it was given.",
        "operators.py",
        "        return normed, total\n",
        "        return normed, residual\n",
        NORM,
    ),
    _one(
        "swiglu.halves",
        "gate and up are exchanged.",
        "operators.py",
        "runtime.ops().npu_swiglu, x, -1)",
        "runtime.ops().npu_swiglu, torch.cat(x.chunk(2, -1)[::-1], -1), -1)",
        OnCard(("silu_and_mul",)),
    ),
    _one(
        "gelu.tanh",
        "gelu is the tanh formula whatever was asked for, as aclnnGelu is.",
        "operators.py",
        "runtime.ops().npu_gelu, x, approximate=approximate)",
        'runtime.ops().npu_gelu, x, approximate="tanh")',
        OnCard(("gelu",)),
    ),
    _one(
        "rotary.mode",
        "Half-split heads are rotated as interleaved ones and the other way round.",
        "operators.py",
        'mode = "half" if rope.style == "half" else "interleave"',
        'mode = "interleave" if rope.style == "half" else "half"',
        ROTARY,
    ),
    _one(
        "rotary.angles",
        "The angles of pairs lie as the other style has them.",
        "step.py",
        'both = [half, half] if rope.style == "half" else',
        'both = [half, half] if rope.style != "half" else',
        ROTARY,
    ),
    _one(
        "embedding.first_row",
        "Ids of other ranks read this rank's first row, not the row of zeros before it.",
        "operators.py",
        "aten.clamp, shifted, 0, rows + 1)",
        "aten.clamp, shifted, 1, rows)",
        OnCard(("embedding",)),
    ),
    _one(
        "kv.slot_order",
        "Keys and values go to the slots in the wrong order.",
        "operators.py",
        'keys, values, stored.slots, cache_mode="Norm")',
        'keys, values, torch.cat((stored.slots[1:], stored.slots[:1])), cache_mode="Norm")',
        WRITE,
    ),
    _one(
        "kv.duplicate_slots",
        "All padding rows of a decode step share one spare slot.",
        "step.py",
        "spec.block_size + np.arange(dropped)",
        "spec.block_size + np.zeros(dropped, dtype=np.int64)",
        WRITE,
    ),
    _one(
        "kv.layout",
        "The scatter is told the default layout, NZ.",
        "operators.py",
        'cache_mode="Norm")',
        'cache_mode="PA_NZ")',
        WRITE,
    ),
    _one(
        "kv.values_as_keys",
        "Values are written to the cache of keys and keys to that of values.",
        "operators.py",
        "scatter, k, v, keys, values, stored.slots",
        "scatter, k, v, values, keys, stored.slots",
        WRITE,
    ),
    _one(
        "attention.layout",
        "The layout string names another order of axes.",
        "attention.py",
        '            input_layout="BSND",\n            num_key_value_heads=cache.spec.kv_heads,\n'
        "            sparse_mode=mode,\n            block_size=size,\n        )\n        attended",
        '            input_layout="BNSD",\n            num_key_value_heads=cache.spec.kv_heads,\n'
        "            sparse_mode=mode,\n            block_size=size,\n        )\n        attended",
        ATTENTION,
    ),
    _one(
        "attention.sparse_mode",
        "The triangle ends at the first key, not at the last.",
        "attention.py",
        "ALL_KEYS, CAUSAL, BAND = 0, 3, 4",
        "ALL_KEYS, CAUSAL, BAND = 0, 2, 4",
        ATTENTION,
    ),
    _one(
        "attention.no_mask",
        "Prefill sees all keys.",
        "attention.py",
        "            mode, mask = CAUSAL, self._triangle(q.device)\n",
        "            mode, mask = ALL_KEYS, None\n",
        ATTENTION,
    ),
    _one(
        "attention.cumulative_lengths",
        "Lengths of keys are summed up, as TND wants them and BSND does not.",
        "attention.py",
        "actual_seq_lengths_kv=list(call.lengths),",
        "actual_seq_lengths_kv=torch.tensor(call.lengths).cumsum(0).clamp(max=tables.shape[1] * size).tolist(),",
        ATTENTION,
    ),
    _one(
        "attention.first_tables",
        "Each call reads the block tables of the step's first sequences.",
        "attention.py",
        "tables[call.first : call.last]\n        size, longest",
        "tables[: call.last - call.first]\n        size, longest",
        ATTENTION,
    ),
    _one(
        "attention.all_heads",
        "Grouped queries are declared as heads with keys of their own.",
        "attention.py",
        "num_key_value_heads=cache.spec.kv_heads,\n            sparse_mode=mode,\n            block_size=size,\n"
        "        )\n        attended",
        "num_key_value_heads=heads,\n            sparse_mode=mode,\n            block_size=size,\n"
        "        )\n        attended",
        ATTENTION,
    ),
    _one(
        "step.stale_metadata",
        "A stage is copied to the device once and never again.",
        "arena.py",
        "        if end:\n",
        "        if end and event is None:\n",
        OnCard(("rotary_embedding", "embedding")),
    ),
    _one(
        "lora.counts",
        "A segment's length is taken for its end.",
        "lora.py",
        "for slot, start, end in zip(slots, starts[:-1], starts[1:], strict=True):",
        "for slot, start, end in zip(slots, starts[:-1], np.diff(starts).tolist(), strict=True):",
        SGMV,
    ),
    _one(
        "lora.mix_dropped",
        "Every adapter has the weight 1.",
        "lora.py",
        "        plain = not weigh or bool(np.all(triples.weights == 1.0))\n",
        "        plain = True\n",
        SGMV,
    ),
    _one(
        "lora.float32_lists",
        "float32 matrices go into lists, which aclnnGroupedMatmul takes of 16 bits alone.",
        "lora.py",
        "    most = 1 if matrices and matrices[0].dtype == torch.float32 else MOST_GROUPS\n",
        "    most = MOST_GROUPS\n",
        SGMV,
    ),
    _one(
        "lora.mixed_transposes",
        "Transposed and dense matrices go into one list.",
        "lora.py",
        "    kinds = ([i for i, m in enumerate(matrices) if m.is_contiguous() == dense] for dense in (True, False))\n",
        "    kinds = [list(range(len(matrices)))]\n",
        SGMV,
    ),
    _one(
        "lora.slices_all_first",
        "All slices read the matrices of the first.",
        "lora.py",
        "rows = store.rows(site, index, slot)",
        "rows = store.rows(site, 0, slot)",
        SGMV,
    ),
    _one(
        "adapters.padded_rank",
        "The true rank is the room of the slot, whose other rows are another adapter's.",
        "adapter_store.py",
        "first_rank_row, rank)\n\n    def covers",
        "first_rank_row + 1, rank)\n\n    def covers",
        SGMV,
    ),
    Mutant(
        "sgmv.any_rank",
        "vllm-ascend's kernels get adapters of every rank.",
        (Edit("vllm_sgmv.py", "where is None or where.rank_rows not in RANKS:", "where is None:"),),
        ByTest(f"{KERNELS}::test_what_depends_on_the_step_goes_to_grouped_matmul_whole"),
    ),
    Mutant(
        "sgmv.strided",
        "vllm-ascend's kernels get operands of any layout.",
        (
            Edit("vllm_sgmv.py", "return x.is_contiguous() and x.storage_offset() % BLOCK == 0", "return True"),
            Edit("vllm_sgmv.py", 'x = self._issuer.operands.dense("sgmv", "x", x)', "pass"),
        ),
        ByTest(f"{KERNELS}::test_strided_operands_never_reach_an_address_that_is_read_densely"),
    ),
    Mutant(
        "sgmv.zero_rows",
        "Rows of zeros stand for what an adapter does not touch.",
        (Edit("vllm_sgmv.py", "if not store.true_rank(spec.site, index, batch.slots[0]):", "if False:"),),
        ByTest(f"{KERNELS}::test_an_infinity_in_x_reaches_no_slice_that_the_adapter_does_not_touch"),
    ),
)
