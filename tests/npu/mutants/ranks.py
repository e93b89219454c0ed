"""Bugs of several ranks: the fused product, its conditions, sums and collectives. Found by calls over ranks."""

from __future__ import annotations

from dataclasses import replace

from tests.npu.constraints.case import StationCase
from tests.npu.mutants.mutant import ByTest, Edit, Mutant, OnRanks

PREFILL = StationCase("row_parallel_linear", "mixed", "float16", 5, 8, (6,), bias=True)
STRIDED = StationCase("row_parallel_linear", "mixed", "float16", 5, 8, (6,), bias=True, layout="transposed")
ADAPTED = StationCase("row_parallel_linear", "mixed", "float16", 5, 8, (6,), bias=True, adapters=(4, 9))
NORMED = StationCase("row_parallel_add_norm", "mixed", "float16", 5, 8, (6,), bias=True, adapters=(4,))
DECODE = StationCase("row_parallel_linear", "decode", "float16", 5, 8, (6,), bias=True)
WIDE = StationCase("row_parallel_linear", "mixed", "float32", 5, 8, (6,), bias=True)
GROUPS = StationCase("row_parallel_linear", "mixed", "float16", 5, 8, (6,), bias=True, second_group=True)
LATER = StationCase("row_parallel_linear", "mixed", "float16", 5, 8, (6,), bias=True, reduce=False)
EMPTY = StationCase("row_parallel_linear", "mixed", "float16", 0, 8, (6,), bias=True)
ALL = (PREFILL, STRIDED, ADAPTED, NORMED, DECODE, WIDE, GROUPS, LATER, EMPTY)


def _one(
    name: str,
    what: str,
    file: str,
    old: str,
    new: str,
    fault: str,
    *cases: StationCase,
    chip: str = "910B",
    world: int = 2,
    more: tuple[Edit, ...] = (),
) -> Mutant:
    return Mutant(name, what, (Edit(file, old, new), *more), OnRanks(fault, cases, chip, world))


def _collective(name: str, what: str, old: str, new: str) -> Mutant:
    return Mutant(name, what, (Edit("communicator.py", old, new),), OnRanks("collectives", collectives=True))


RANKS: tuple[Mutant, ...] = (
    _one(
        "linear.cached_transpose",
        "A transposed copy of a weight is kept by its address, and outlives what was there (vllm-ascend 5747).",
        "operands.py",
        "        return matrix.t()\n",
        "        kept = self.__dict__.setdefault('kept', {})\n"
        "        key = matrix.data_ptr(), tuple(matrix.shape)\n"
        "        if key not in kept:\n"
        "            kept[key] = matrix.t().contiguous()\n"
        "        return kept[key]\n",
        "values",
        *(replace(PREFILL, k=k, seed=seed) for k in (8, 40, 300) for seed in range(4)),
        world=1,
    ),
    _one(
        "operands.no_contiguous",
        "The founding case: nothing is made dense.",
        "operands.py",
        "        if x.is_contiguous():\n",
        "        if x is not None:\n",
        "refused",
        STRIDED,
    ),
    _one(
        "operands.uncounted",
        "Copies do not appear in the ledger.",
        "operands.py",
        '        self._ledger.record(f"{COPY_PREFIX}{operator}.{argument}")\n',
        "",
        "copies",
        STRIDED,
    ),
    _one(
        "operands.always_copied",
        "What is dense is copied all the same.",
        "operands.py",
        "        if x.is_contiguous():\n            return x\n",
        "",
        "copies",
        PREFILL,
    ),
    _one(
        "operands.x2_strided",
        "The weight's rows lie in a wider buffer.",
        "operands.py",
        "        return matrix.t()\n",
        "        return torch.cat((matrix, matrix), 1)[:, : matrix.shape[1]].t()\n",
        "refused",
        PREFILL,
    ),
    _one(
        "fused.x3_strided",
        "The adapters' delta is a view of a wider one.",
        "fused.py",
        '        given = {"x1": x1',
        '        x3 = None if x3 is None else torch.cat((x3, x3), 1)[:, : x3.shape[1]]\n        given = {"x1": x1',
        "refused",
        ADAPTED,
    ),
    _one(
        "fused.bias_strided",
        "The bias is a column of a wider matrix.",
        "fused.py",
        '        given = {"x1": x1',
        '        bias = None if bias is None else torch.stack((bias, bias), 1)[:, 0]\n        given = {"x1": x1',
        "refused",
        PREFILL,
    ),
    Mutant(
        "fused.long_k",
        "Any k is believed to be legal.",
        (Edit("fused.py", "MOST_K = 2**31 - 1", "MOST_K = 2**40"),),
        ByTest("tests/npu/test_fused_rules.py::test_each_rule_that_is_broken_is_a_reason_of_its_own"),
    ),
    _one(
        "fused.float32_x3",
        "The adapters' delta is float32.",
        "lora.py",
        "return None if total is None else self._cast(total, x.dtype)",
        "return total",
        "refused",
        ADAPTED,
    ),
    _one(
        "fused.float32",
        "float32 products are fused.",
        "fused.py",
        'DTYPES = ("float16", "bfloat16")',
        'DTYPES = ("float16", "bfloat16", "float32")',
        "refused",
        WIDE,
    ),
    _one(
        "fused.decode",
        "Steps of decode are fused.",
        "fused.py",
        "    if query.token_class is TokenClass.DECODE:\n",
        "    if query.token_class is None:\n",
        "witness: use",
        DECODE,
    ),
    _one(
        "fused.three_ranks",
        "Three ranks are fused.",
        "fused.py",
        "WORLDS = (1, 2, 4, 8)",
        "WORLDS = (1, 2, 3, 4, 8)",
        "refused",
        PREFILL,
        world=3,
    ),
    _one(
        "fused.a3",
        "A3 is taken for A2.",
        "chip.py",
        'A3 = Chip("A3")',
        'A3 = Chip("A3", fused_all_reduce=True)',
        "refused",
        PREFILL,
        chip="A3",
    ),
    _one(
        "fused.empty",
        "Empty operands are handed over.",
        "fused.py",
        "        if not x.shape[0] or not matrix.shape[0]:\n",
        "        if not matrix.shape[0]:\n",
        "refused",
        EMPTY,
    ),
    _one(
        "fused.max",
        "The reduction is a maximum.",
        "fused.py",
        'hcom, reduce_op="sum"',
        'hcom, reduce_op="max"',
        "refused",
        PREFILL,
    ),
    _one(
        "fused.two_communicators",
        "The latest communicator serves the fused operator, whatever served it before.",
        "fused.py",
        "        elif len(groups) > 1:\n",
        "        elif not groups[-1]:\n",
        "refused",
        PREFILL,
        GROUPS,
        more=(Edit("fused.py", "    return comm\n", "    return groups[-1]\n"),),
    ),
    _one(
        "fused.unfused",
        "Nothing is ever fused, for the reason that a group is open.",
        "communicator.py",
        "            [] if len(hosts) == 1 else",
        "            [] if len(hosts) == 0 else",
        "fused",
        PREFILL,
    ),
    _one(
        "fused.bias_on_every_rank",
        "Every rank passes the bias, which is summed.",
        "stations.py",
        "        return self._fused(x, own.tensor, group, own.bias, delta)\n",
        "        bias = x.new_zeros(own.spec.n) if own.bias is None else own.bias.clone()\n"
        "        return self._fused(x, own.tensor, group, group.all_reduce(bias), delta)\n",
        "values",
        PREFILL,
    ),
    _one(
        "fused.full_delta",
        "x3 is the whole delta on every rank, not this rank's part.",
        "stations.py",
        "        return self._fused(x, own.tensor, group, own.bias, delta)\n",
        "        delta = None if delta is None else group.all_reduce(delta)\n"
        "        return self._fused(x, own.tensor, group, own.bias, delta)\n",
        "values",
        ADAPTED,
    ),
    _one(
        "fused.delta_dropped",
        "The adapters' delta is forgotten where the product is fused.",
        "stations.py",
        "        return self._fused(x, own.tensor, group, own.bias, delta)\n",
        "        return self._fused(x, own.tensor, group, own.bias, None)\n",
        "values",
        ADAPTED,
    ),
    _one(
        "parts.not_summed",
        "Products are not summed over ranks at decode.",
        "stations.py",
        "return comm.all_reduce(y) if reduce and comm.world_size > 1 else y",
        "return y",
        "sums",
        DECODE,
    ),
    _one(
        "parts.summed_twice",
        "A sum that the caller makes later is made here as well.",
        "stations.py",
        "return comm.all_reduce(y) if reduce and comm.world_size > 1 else y",
        "return comm.all_reduce(y)",
        "sums",
        LATER,
    ),
    _one(
        "chip.310p_grouped",
        "310P is believed to have grouped matmul of lists.",
        "chip.py",
        'P310 = Chip("310P", bfloat16=False, paged=False, grouped_float32=False,',
        'P310 = Chip("310P", bfloat16=False, paged=False, grouped_float32=True,',
        "refused",
        ADAPTED,
        chip="310P",
    ),
    _one(
        "chip.310p_float32",
        "Products of float32 on 310P are believed to be float32.",
        "chip.py",
        "grouped_float32=False, float32_products=False)\nA1",
        "grouped_float32=False)\nA1",
        "values",
        WIDE,
        chip="310P",
    ),
    _one(
        "chip.310p_bfloat16",
        "310P is believed to have bfloat16.",
        "chip.py",
        'P310 = Chip("310P", bfloat16=False,',
        'P310 = Chip("310P", bfloat16=True,',
        "refused: rank 0: RuntimeError",
        StationCase("row_parallel_linear", "mixed", "bfloat16", 5, 8, (6,)),
        chip="310P",
    ),
    _collective(
        "gather.order",
        "Gathered parts are in another order than that of the ranks.",
        "return joined.movedim(0, dim).reshape(shape)",
        "return torch.cat((joined[1:], joined[:1])).movedim(0, dim).reshape(shape)",
    ),
    _collective(
        "gather.axis",
        "Parts are joined along the first axis.",
        "return joined.movedim(0, dim).reshape(shape)",
        "return joined.reshape(shape)",
    ),
    _collective(
        "reduce.strided_lost",
        "The sum of a strided tensor stays in its copy.",
        "self._hccl.allreduce([dense]).wait())\n            if dense is not x:\n                x.copy_(dense)\n",
        "self._hccl.allreduce([dense]).wait())\n",
    ),
    _collective(
        "broadcast.source",
        "Everything is broadcast from rank 0.",
        "            options.rootRank = source\n",
        "            options.rootRank = 0\n",
    ),
)
