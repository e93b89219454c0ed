"""Norms, activations, rotary embedding and matrix products against float64, and what their pages forbid."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_cannsim.operators.environment import CHIP_310P
from polyaccel_cannsim.operators.refusal import INVALID, NULL_POINTER, TILING
from tests.cannsim_operators.operands import FLOATS, check, close, draw, environment, exact, refused, run, shuffled

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=2)
DTYPE = st.sampled_from(FLOATS)


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


@given(seed=st.integers(0, 2**16), lead=SHAPES, width=st.integers(1, 70), dtype=DTYPE, wide_gamma=st.booleans())
def test_rms_norm_and_add_rms_norm_match_float64(
    seed: int, lead: list[int], width: int, dtype: torch.dtype, wide_gamma: bool
) -> None:
    a, b = draw(seed, *lead, width, dtype=dtype), draw(seed + 1, *lead, width, dtype=dtype)
    gamma = draw(seed + 2, width, dtype=torch.float32 if wide_gamma else dtype)
    y, rstd = torch.empty_like(a), torch.empty(*lead, 1)
    run("aclnnRmsNorm", shuffled(a, range(a.ndim)[::-1]), gamma, 1e-6, y, rstd)
    scale = 1 / np.sqrt((exact(a) ** 2).mean(-1, keepdims=True) + 1e-6)
    close(y, exact(a) * scale * exact(gamma), abs(exact(a) * scale * exact(gamma)), terms=width)
    close(rstd, scale, scale, terms=width)
    if not wide_gamma:
        total = torch.empty_like(a)
        run("aclnnAddRmsNorm", a, b, gamma, 1e-6, y, rstd, total)
        both = exact(a) + exact(b)
        size = abs(exact(a)) + abs(exact(b))
        scale = 1 / np.sqrt((both**2).mean(-1, keepdims=True) + 1e-6)
        close(total, both, size)
        close(y, both * scale * exact(gamma), size * scale * abs(exact(gamma)) * (1 + scale * size.max()), terms=width)


@given(seed=st.integers(0, 2**16), lead=SHAPES, width=st.integers(2, 70), dtype=DTYPE, affine=st.booleans())
def test_layer_norm_matches_float64(seed: int, lead: list[int], width: int, dtype: torch.dtype, affine: bool) -> None:
    x = draw(seed, *lead, width, dtype=dtype)
    weight, bias = (draw(seed + i, width, dtype=dtype) if affine else None for i in (1, 2))
    out = torch.empty_like(x)
    run("aclnnLayerNorm", x, (width,), weight, bias, 1e-5, out, None, None)
    centred = exact(x) - exact(x).mean(-1, keepdims=True)
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    scale = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    size = abs(exact(x)).max() * scale * (1 + abs(wanted))
    if weight is not None and bias is not None:
        wanted = wanted * exact(weight) + exact(bias)
        size = size * abs(exact(weight)) + abs(exact(bias))
    close(out, wanted, size, terms=2 * width)


def _silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def _tanh_gelu(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _erf_gelu(x: Any) -> Any:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 5), width=st.integers(1, 40), dtype=DTYPE)
def test_activations_match_float64(seed: int, rows: int, width: int, dtype: torch.dtype) -> None:
    x = draw(seed, rows, 2 * width, dtype=dtype, scale=2)
    gate, up = exact(x)[:, :width], exact(x)[:, width:]
    out = torch.empty(rows, width, dtype=dtype)
    run("aclnnSwiGlu", x, -1, out)
    close(out, _silu(gate) * up, abs(gate * up))
    out = torch.empty_like(x)
    for name, arguments, function in (
        ("aclnnSilu", (), _silu),
        ("aclnnSigmoid", (), lambda v: 1 / (1 + np.exp(-v))),
        ("aclnnGelu", (), _tanh_gelu),
        ("aclnnGeluV2", (1,), _tanh_gelu),
        ("aclnnGeluV2", (0,), _erf_gelu),
    ):
        run(name, x, *arguments, out)
        close(out, function(exact(x)), abs(exact(x)) + 1)


def test_gelu_of_cann_is_the_tanh_formula_and_differs_from_the_exact_one() -> None:
    x, out = torch.tensor([-2.3, 2.3]), torch.empty(2)
    run("aclnnGelu", x, out)
    assert (out - torch.nn.functional.gelu(x)).abs().max() > 1e-4


@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4)),
    width=st.sampled_from([2, 10, 64, 128]),
    dtype=DTYPE,
    interleave=st.booleans(),
)
def test_rotary_embeddings_match_float64(
    seed: int, shape: tuple[int, int, int], width: int, dtype: torch.dtype, interleave: bool
) -> None:
    batch, length, heads = shape
    x = draw(seed, batch, length, heads, width, dtype=dtype)
    angle = torch.rand(1 if interleave else batch, length, 1, width, generator=torch.Generator().manual_seed(seed)) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def turned(v: Any) -> Any:
        if interleave:
            return np.stack((-v[..., 1::2], v[..., 0::2]), -1).reshape(v.shape)
        return np.concatenate((-v[..., width // 2 :], v[..., : width // 2]), -1)

    wanted = exact(x) * exact(cos) + turned(exact(x)) * exact(sin)
    size = abs(exact(x)) + abs(turned(exact(x)))
    out = torch.empty_like(x)
    run("aclnnRotaryPositionEmbedding", x, cos, sin, int(interleave), out)
    close(out, wanted, size)
    if width in (64, 128) and not interleave:
        query, key = x.clone(), x.clone()
        run("aclnnApplyRotaryPosEmbV2", query, key, cos, sin, 1, "half")
        assert torch.equal(query, out)
        assert torch.equal(key, out)


@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 80), st.integers(1, 9)),
    dtype=DTYPE,
    turned=st.tuples(st.booleans(), st.booleans()),
)
def test_matrix_products_match_float64_whatever_the_strides(
    seed: int, shape: tuple[int, int, int], dtype: torch.dtype, turned: tuple[bool, bool]
) -> None:
    m, k, n = shape
    a = draw(seed, k, m, dtype=dtype).t() if turned[0] else draw(seed, m, k, dtype=dtype)
    b = draw(seed + 1, n, k, dtype=dtype).t() if turned[1] else draw(seed + 1, k, n, dtype=dtype)
    bias = draw(seed + 2, n, dtype=dtype)
    wanted, size = exact(a) @ exact(b), abs(exact(a)) @ abs(exact(b))
    out = torch.empty(m, n, dtype=dtype)
    for name in ("aclnnMm", "aclnnMatmul"):
        run(name, a, b, out, 0)
        close(out, wanted, size, terms=k)
    run("aclnnAddmm", bias, a, b, 0.5, 2, out, 0)
    close(out, 0.5 * exact(bias) + 2 * wanted, abs(exact(bias)) + 2 * size, terms=k)
    batched = torch.empty(2, m, n, dtype=dtype)
    run("aclnnBatchMatMul", a.expand(2, m, k), b.expand(1, k, n), batched, 0)
    close(batched, np.broadcast_to(wanted, batched.shape), size, terms=k)


def test_hf32_rounds_float32_operands_to_11_bits() -> None:
    fine = torch.tensor([[1 + 2.0**-12]])
    out = torch.empty(1, 1)
    run("aclnnMm", fine, torch.ones(1, 1), out, 0)
    assert out.item() == 1 + 2.0**-12
    run("aclnnMm", fine, torch.ones(1, 1), out, 1)
    assert out.item() == 1


@pytest.mark.parametrize(
    ("code", "words", "name", "arguments"),
    [
        (TILING, "gamma", "aclnnRmsNorm", (empty(2, 8), empty(7), 1e-6, empty(2, 8), torch.empty(2, 1))),
        (
            INVALID,
            "combination",
            "aclnnRmsNorm",
            (torch.empty(2, 8), empty(8), 1e-6, torch.empty(2, 8), torch.empty(2, 1)),
        ),
        (INVALID, "rstdOut", "aclnnRmsNorm", (empty(2, 8), empty(8), 1e-6, empty(2, 8), empty(2, 1))),
        (NULL_POINTER, "gamma", "aclnnRmsNorm", (empty(2, 8), None, 1e-6, empty(2, 8), torch.empty(2, 1))),
        (
            *(INVALID, "same dtype", "aclnnAddRmsNorm"),
            (empty(2, 8), empty(2, 8), torch.empty(8), 1e-6, empty(2, 8), torch.empty(2, 1), empty(2, 8)),
        ),
        (
            *(INVALID, "x2", "aclnnAddRmsNorm"),
            (empty(2, 8), empty(1, 8), empty(8), 1e-6, empty(2, 8), torch.empty(2, 1), empty(2, 8)),
        ),
        (TILING, "must be even", "aclnnSwiGlu", (empty(2, 7), -1, empty(2, 3))),
        (INVALID, "non-contiguous", "aclnnSwiGlu", (empty(8, 2).t(), -1, empty(2, 4))),
        (INVALID, "out of range", "aclnnSwiGlu", (empty(2, 8), 2, empty(2, 4))),
        (INVALID, "normalizedShape", "aclnnLayerNorm", (empty(2, 8), (7,), None, None, 1e-5, empty(2, 8), None, None)),
        (INVALID, "approximate", "aclnnGeluV2", (empty(2), 2, empty(2))),
        (
            *(INVALID, "D must be even", "aclnnRotaryPositionEmbedding"),
            (empty(1, 2, 3, 7), empty(1, 2, 1, 7), empty(1, 2, 1, 7), 0, empty(1, 2, 3, 7)),
        ),
        (
            *(INVALID, "less than 896", "aclnnRotaryPositionEmbedding"),
            (empty(1, 1, 1, 896), empty(1, 1, 1, 896), empty(1, 1, 1, 896), 0, empty(1, 1, 1, 896)),
        ),
        (
            *(INVALID, "does not fit", "aclnnRotaryPositionEmbedding"),
            (empty(2, 3, 4, 8), empty(1, 1, 1, 8), empty(1, 1, 1, 8), 0, empty(2, 3, 4, 8)),
        ),
        (
            *(INVALID, "exceed", "aclnnRotaryPositionEmbedding"),
            (empty(1000, 1, 1, 2), empty(1, 1, 1, 2), empty(1, 1, 1, 2), 0, empty(1000, 1, 1, 2)),
        ),
        (
            *(INVALID, "64 or 128", "aclnnApplyRotaryPosEmb"),
            (empty(1, 2, 3, 32), empty(1, 2, 3, 32), empty(1, 2, 1, 32), empty(1, 2, 1, 32), 1),
        ),
        (
            *(INVALID, "BSND", "aclnnApplyRotaryPosEmb"),
            (empty(1, 2, 3, 64), empty(1, 2, 3, 64), empty(1, 2, 1, 64), empty(1, 2, 1, 64), 3),
        ),
        (
            *(INVALID, "only half", "aclnnApplyRotaryPosEmbV2"),
            (empty(1, 2, 3, 64), empty(1, 2, 3, 64), empty(1, 2, 1, 64), empty(1, 2, 1, 64), 1, "interleave"),
        ),
        (INVALID, "k-axis", "aclnnMm", (empty(2, 3), empty(4, 5), empty(2, 5), 0)),
        (INVALID, "no common type", "aclnnMm", (empty(2, 3), empty(3, 5, dtype=torch.bfloat16), empty(2, 5), 0)),
        (INVALID, "dtype support list", "aclnnMm", (torch.ones(2, 3).int(), empty(3, 5), empty(2, 5), 0)),
        (INVALID, "cubeMathType 2", "aclnnMm", (*(empty(2, 2, dtype=torch.bfloat16) for _ in range(3)), 2)),
        (INVALID, "broadcast", "aclnnAddmm", (empty(4), empty(2, 3), empty(3, 5), 1, 1, empty(2, 5), 0)),
        (INVALID, "dimensions", "aclnnBatchMatMul", (empty(2, 3), empty(3, 5), empty(2, 5), 0)),
    ],
)
def test_the_simulator_refuses_what_the_pages_forbid(
    code: int, words: str, name: str, arguments: tuple[Any, ...]
) -> None:
    refused(code, words, name, *arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("aclnnRmsNorm", lambda x: (x, x[0], 1e-6, x, torch.empty(2, 1))),
        ("aclnnAddRmsNorm", lambda x: (x, x, x[0], 1e-6, x, torch.empty(2, 1), x)),
        ("aclnnSwiGlu", lambda x: (x, -1, x[:, :64].contiguous())),
        ("aclnnMm", lambda x: (x, x.t(), torch.empty(2, 2, dtype=x.dtype), 0)),
        ("aclnnSilu", lambda x: (x, x)),
        ("aclnnAdd", lambda x: (x, x, 1, x)),
        ("aclnnEmbedding", lambda x: (x, torch.tensor([1]), x[:1])),
        ("aclnnSoftmax", lambda x: (x, -1, x)),
        ("aclnnCat", lambda x: ((x, x), 0, torch.empty(4, 128, dtype=x.dtype))),
    ],
)
def test_the_simulator_refuses_bfloat16_on_310p(name: str, arguments: Any) -> None:
    env = environment(chip=CHIP_310P)
    check(name, *arguments(torch.zeros(2, 128, dtype=torch.float16)), env=env)
    refused(INVALID, "dtype support list", name, *arguments(torch.zeros(2, 128, dtype=torch.bfloat16)), env=env)


def test_rotary_tables_of_three_axes_are_legal_only_in_the_second_version() -> None:
    x, table = empty(5, 2, 64), empty(5, 1, 64)
    refused(INVALID, "dimensions", "aclnnRotaryPositionEmbedding", x, table, table, 0, x)
    check("aclnnRotaryPositionEmbeddingV2", x, table, table, 0, None, x)


def test_the_simulator_refuses_rotary_mul_on_310p() -> None:
    x = empty(1, 2, 1, 64)
    refused(INVALID, "not supported", "aclnnRotaryPositionEmbedding", x, x, x, 0, x, env=environment(chip=CHIP_310P))
