from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from polyaccel.backend.errors import AdapterIncompatible, ModelLoadError
from polyaccel.weights.safetensors_file import SafetensorsFile
from tests.weights.files import entry, safetensors_bytes, write

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "too short": (b"\x01\x00", "too few"),
    "truncated header": (safetensors_bytes({"a": entry("F32", [1], 0, 4)}, b"")[:-5], "truncated"),
    "huge header length": (safetensors_bytes(b"{}", length=2**63), "exceeds the limit"),
    "header length just above the limit": (safetensors_bytes(b"{}", length=100_000_001), "exceeds the limit"),
    "header longer than the file": (safetensors_bytes(b"{}", length=3), "does not fit"),
    "header length zero": (safetensors_bytes(b"", b"abcd"), "does not fit"),
    "not JSON": (safetensors_bytes(b"{nope}"), "not valid JSON"),
    "not an object": (safetensors_bytes(b"[1, 2]"), "does not begin with"),
    "not UTF-8": (safetensors_bytes(b'{"\xff\xfe": 1}'), "not valid UTF-8"),
    "nested too deeply": (safetensors_bytes(b'{"a":' * 100_000), "nested too deeply"),
    "a number of too many digits": (safetensors_bytes(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "duplicate name": (
        safetensors_bytes(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8"}}', b"x"),
        "'a' occurs twice",
    ),
    "duplicate key inside": (safetensors_bytes(b'{"a":{"dtype":"U8","dtype":"I8"}}'), "'dtype' occurs twice"),
    "entry is no object": (safetensors_bytes({"a": 3}), "tensor 'a': its header entry is int"),
    "unknown dtype": (safetensors_bytes({"a": entry("F7", [1], 0, 1)}, b"x"), "tensor 'a': dtype 'F7'"),
    "dtype is no string": (safetensors_bytes({"a": entry([], [1], 0, 1)}, b"x"), "dtype '\\[\\]'"),  # type: ignore[arg-type]
    "negative dimension": (safetensors_bytes({"a": entry("U8", [-1], 0, 1)}, b"x"), r"tensor 'a': shape \[-1\]"),
    "two negative dimensions": (safetensors_bytes({"a": entry("U8", [-2, -2], 0, 4)}, b"xxxx"), r"shape \[-2, -2\]"),
    "fractional dimension": (safetensors_bytes({"a": entry("U8", [1.0], 0, 1)}, b"x"), r"shape \[1.0\]"),
    "boolean dimension": (safetensors_bytes({"a": entry("U8", [True], 0, 1)}, b"x"), r"shape \[True\]"),
    "overflowing dimensions": (safetensors_bytes({"a": entry("F32", [2**32, 2**32], 0, 0)}), "larger than the file"),
    "overflow hidden by a zero": (safetensors_bytes({"a": entry("F32", [0, 2**70], 0, 0)}), "overflows"),
    "too many dimensions": (safetensors_bytes({"a": entry("U8", [1] * 65, 0, 1)}, b"x"), "at most 64"),
    "shape missing": (safetensors_bytes({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"), "shape None"),
    "offsets beyond the file": (safetensors_bytes({"a": entry("U8", [2], 0, 2)}, b"x"), "do not lie"),
    "offsets reversed": (safetensors_bytes({"a": entry("U8", [1], 1, 0)}, b"x"), "do not lie"),
    "offsets negative": (safetensors_bytes({"a": entry("U8", [1], -1, 0)}, b"x"), "do not lie"),
    "offsets of the wrong size": (safetensors_bytes({"a": entry("F32", [1], 0, 3)}, b"xxx"), "do not hold the 4 bytes"),
    "one offset": (safetensors_bytes({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"x"), "do not lie"),
    "overlap": (
        safetensors_bytes({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xxx"),
        "'b' at data offset 1 overlaps",
    ),
    "the same bytes twice": (
        safetensors_bytes({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, b"xx"),
        "overlaps",
    ),
    "hole": (
        safetensors_bytes({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"xxx"),
        "'b' at data offset 2 leaves a hole",
    ),
    "bytes after the last tensor": (safetensors_bytes({"a": entry("U8", [1], 0, 1)}, b"xx"), "end at byte"),
    "metadata of the wrong type": (safetensors_bytes({"__metadata__": [1]}), "__metadata__ is list"),
    "metadata value of the wrong type": (safetensors_bytes({"__metadata__": {"k": 1}}), r"__metadata__\['k'\] is int"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, reason = HOSTILE[case]
    path = write(tmp_path / "hostile.safetensors", content)
    with pytest.raises(ModelLoadError, match=f"hostile.safetensors.*{reason}"):
        SafetensorsFile(path)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(ModelLoadError, match=path.name):
            SafetensorsFile(path)


def test_the_caller_chooses_the_error_type(tmp_path: Path) -> None:
    with pytest.raises(AdapterIncompatible):
        SafetensorsFile(write(tmp_path / "a", b"nonsense"), error=AdapterIncompatible)
    file = SafetensorsFile(write(tmp_path / "b", save({"t": torch.ones(2)})), error=AdapterIncompatible)
    with pytest.raises(AdapterIncompatible, match="no tensor 'x'"):
        file.read("x")
    with pytest.raises(AdapterIncompatible):
        file.read("t", slice(0, 3))


@given(st.data())
def test_tensors_come_back_as_they_were_saved(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    tensors = {}
    for index in range(data.draw(st.integers(0, 4), label="tensors")):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=4), label="shape")
        dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
        tensors[f"t{index}"] = torch.randint(0, 2, shape, generator=random).to(dtype)
    path = tmp_path_factory.mktemp("saved") / "f.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert set(file.names()) == set(tensors)
    assert file.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert file.shape(name) == tuple(tensor.shape)
        assert file.dtype(name) == tensor.dtype
        assert file.nbytes(name) == tensor.numel() * tensor.element_size()
        read = file.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert torch.equal(read.to(torch.float64), tensor.to(torch.float64))


@given(rows=st.integers(0, 6), cols=st.integers(0, 6), data=st.data())
def test_parts_equal_slices_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, rows: int, cols: int, data: st.DataObject
) -> None:
    whole = torch.arange(rows * cols, dtype=torch.float32).view(rows, cols)
    file = SafetensorsFile(write(tmp_path_factory.mktemp("parts") / "f.safetensors", save({"t": whole})))
    top, bottom = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows)), label="rows"))
    left, right = sorted(data.draw(st.tuples(st.integers(0, cols), st.integers(0, cols)), label="cols"))
    assert torch.equal(file.read("t", slice(top, bottom), slice(left, right)), whole[top:bottom, left:right])
    assert torch.equal(file.read("t", cols=slice(left, None)), whole[:, left:])


@pytest.mark.parametrize("part", [slice(0, 4), slice(-1, 2), slice(2, 1), slice(0, 2, 2), slice(4, 5)])
def test_a_slice_beyond_the_shape_is_refused_and_not_clipped(tmp_path: Path, part: slice) -> None:
    file = SafetensorsFile(write(tmp_path / "f", save({"t": torch.ones(3, 3), "v": torch.ones(3)})))
    with pytest.raises(ModelLoadError, match="'t'"):
        file.read("t", rows=part)
    with pytest.raises(ModelLoadError, match="'t'"):
        file.read("t", cols=part)
    with pytest.raises(ModelLoadError, match="too few dimensions"):
        file.read("v", cols=slice(0, 1))


def test_a_tensor_at_an_odd_offset_is_read_right(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.25])
    data = b"x" + bytes(values.view(torch.uint8).tolist())
    header = json.dumps({"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}).encode()
    file = SafetensorsFile(write(tmp_path / "f", safetensors_bytes(header, data)))
    assert torch.equal(file.read("b"), values)


def test_any_byte_of_a_boolean_but_zero_is_true(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path / "f", safetensors_bytes({"a": entry("BOOL", [3], 0, 3)}, b"\x00\x02\xff")))
    assert file.read("a").tolist() == [False, True, True]


def test_a_write_to_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "f", save({"t": torch.zeros(4)}))
    before = path.read_bytes()
    SafetensorsFile(path).read("t").fill_(1.0)
    assert path.read_bytes() == before
    assert SafetensorsFile(path).read("t").sum() == 0


def test_tensors_outlive_the_file_but_reading_ends_with_it(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path / "f", save({"t": torch.ones(4)})))
    tensor = file.read("t")
    file.close()
    file.close()
    assert tensor.sum() == 4
    with pytest.raises(ModelLoadError, match=r"after close\(\)"):
        file.read("t")


def test_the_digest_tells_contents_apart(tmp_path: Path) -> None:
    one, two = torch.zeros(10_000), torch.zeros(10_000)
    two[5000] = 1.0
    digests = [
        SafetensorsFile(write(tmp_path / str(i), save({"t": t}))).digest() for i, t in enumerate((one, two, one))
    ]
    assert digests[0] != digests[1]
    assert digests[0] == digests[2]
