from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from polyaccel.backend.errors import ModelLoadError
from polyaccel.weights.gguf_file import GGUFFile
from tests.weights.files import gguf_bytes, gguf_info, gguf_key, gguf_string, write, write_gguf

UINT32, STRING, ARRAY, BOOL, UINT64 = 4, 8, 9, 7, 10
F32 = 0
HUGE = 2**63
GOOD = gguf_info("t", [8], F32, 0)


def array(code: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", code, count) + content


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "short": (b"GGUF\x03\x00\x00\x00", "cut off"),
    "wrong magic": (b"GGML" + bytes(40), "not a GGUF file"),
    "version 1": (gguf_bytes(version=1), "version 1 is not supported"),
    "big-endian": (gguf_bytes(version=3 << 24), "big-endian"),
    "huge tensor count": (gguf_bytes(tensor_count=HUGE), "do not fit"),
    "huge key count": (gguf_bytes(key_count=HUGE), "do not fit"),
    "more keys than there are": (
        gguf_bytes([gguf_key("a", UINT32, bytes(4))], key_count=2, data=bytes(32)),
        "key is empty",
    ),
    "string beyond the file": (
        gguf_bytes([gguf_string("k") + struct.pack("<IQ", STRING, 1 << 20)], data=bytes(64)),
        "'k' takes 1048576 bytes",
    ),
    "string of absurd length": (gguf_bytes([gguf_string("k") + struct.pack("<IQ", STRING, HUGE)]), "more than"),
    "key of absurd length": (gguf_bytes([struct.pack("<Q", HUGE) + bytes(20)]), "a metadata key is said to have"),
    "key beyond the file": (gguf_bytes([struct.pack("<Q", 500) + bytes(20)]), "a metadata key takes 500 bytes"),
    "key not UTF-8": (gguf_bytes([struct.pack("<Q", 1) + b"\xff" + bytes(20)]), "not valid UTF-8"),
    "value not UTF-8": (gguf_bytes([gguf_key("k", STRING, struct.pack("<Q", 1) + b"\xff")]), "not valid UTF-8"),
    "unknown type": (gguf_bytes([gguf_key("k", 99, bytes(8))]), "'k' has unknown type 99"),
    "unknown element type": (gguf_bytes([gguf_key("k", ARRAY, array(99, 1, bytes(8)))]), "array of unknown type 99"),
    "array longer than the file": (gguf_bytes([gguf_key("k", ARRAY, array(UINT32, 1000))]), "'k' .* 1000 elements"),
    "array of absurd length": (gguf_bytes([gguf_key("k", ARRAY, array(0, HUGE))]), "'k' .* elements"),
    "array of strings beyond the file": (
        gguf_bytes([gguf_key("k", ARRAY, array(STRING, 2, gguf_string("a") + struct.pack("<Q", 999)))], data=bytes(32)),
        "string 1 of 'k' is said to have 999",
    ),
    "array of strings not UTF-8": (
        gguf_bytes([gguf_key("k", ARRAY, array(STRING, 1, struct.pack("<Q", 1) + b"\xff"))]),
        "string 0 of 'k' is not valid UTF-8",
    ),
    "arrays nested too deeply": (
        gguf_bytes([gguf_key("k", ARRAY, array(ARRAY, 1) * 9)], data=bytes(32)),
        "nests arrays",
    ),
    "boolean of another value": (gguf_bytes([gguf_key("k", BOOL, b"\x02")]), "boolean 'k' has the byte 2"),
    "duplicate key": (gguf_bytes([gguf_key("k", BOOL, b"\x01")] * 2), "'k' occurs twice"),
    "alignment zero": (
        gguf_bytes([gguf_key("general.alignment", UINT32, bytes(4))], [GOOD], bytes(32)),
        "general.alignment is 0",
    ),
    "alignment no power of two": (
        gguf_bytes([gguf_key("general.alignment", UINT32, struct.pack("<I", 48))], [GOOD], bytes(32)),
        "general.alignment is 48",
    ),
    "alignment beyond reason": (
        gguf_bytes([gguf_key("general.alignment", UINT64, struct.pack("<Q", HUGE))], [GOOD], bytes(32)),
        "general.alignment is 9223372036854775808",
    ),
    "no dimensions": (gguf_bytes(tensors=[gguf_info("t", [], F32, 0)], data=bytes(32)), "'t' has 0 dimensions"),
    "too many dimensions": (gguf_bytes(tensors=[gguf_info("t", [1] * 5, F32, 0)], data=bytes(32)), "5 dimensions"),
    "dimension zero": (gguf_bytes(tensors=[gguf_info("t", [0, 4], F32, 0)], data=bytes(32)), "impossible shape"),
    "dimension beyond 63 bits": (gguf_bytes(tensors=[gguf_info("t", [HUGE], F32, 0)], data=bytes(32)), "impossible"),
    "dimensions whose product overflows to zero": (
        gguf_bytes(tensors=[gguf_info("t", [2**32, 2**32], F32, 0)], data=bytes(32)),
        "impossible shape",
    ),
    "rows that are no whole blocks": (
        gguf_bytes(tensors=[gguf_info("t", [33], 2, 0)], data=bytes(64)),
        "whole Q4_0 blocks",
    ),
    "unsupported type": (gguf_bytes(tensors=[gguf_info("t", [256], 12, 0)], data=bytes(144)), "'t' is stored as Q4_K"),
    "unknown tensor type": (gguf_bytes(tensors=[gguf_info("t", [32], 999, 0)], data=bytes(99)), "unknown type 999"),
    "offset beyond the file": (
        gguf_bytes(tensors=[gguf_info("t", [8], F32, 64)], data=bytes(32)),
        "leave the 32 bytes",
    ),
    "offset near 64 bits": (gguf_bytes(tensors=[gguf_info("t", [8], F32, 2**64 - 32)], data=bytes(32)), "leave the 32"),
    "offset not aligned": (gguf_bytes(tensors=[gguf_info("t", [4], F32, 8)], data=bytes(32)), "not a multiple"),
    "data cut off": (gguf_bytes(tensors=[GOOD], data=bytes(31)), "32 bytes at offset 0 leave the 31 bytes"),
    "overlapping tensors": (
        gguf_bytes(tensors=[gguf_info("t", [16], F32, 0), gguf_info("u", [8], F32, 32)], data=bytes(64)),
        "'t' and 'u' overlap",
    ),
    "duplicate tensor": (gguf_bytes(tensors=[GOOD, GOOD], data=bytes(64)), "'t' occurs twice"),
    "tensor name too long": (
        gguf_bytes(tensors=[gguf_info("n" * 2000, [8], F32, 0)], data=bytes(32)),
        "more than 1024",
    ),
    "tensor infos cut off": (gguf_bytes(tensors=[GOOD])[:40], "."),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, reason = HOSTILE[case]
    with pytest.raises(ModelLoadError, match=f"(?s)hostile.gguf.*{reason}"):
        GGUFFile(write(tmp_path / "hostile.gguf", content))


def test_metadata_of_every_type_come_back(tmp_path: Path) -> None:
    keys = [
        gguf_key("u8", 0, b"\xff"),
        gguf_key("i8", 1, b"\xff"),
        gguf_key("u16", 2, struct.pack("<H", 65535)),
        gguf_key("i16", 3, struct.pack("<h", -5)),
        gguf_key("u32", 4, struct.pack("<I", 2**32 - 1)),
        gguf_key("i32", 5, struct.pack("<i", -7)),
        gguf_key("f32", 6, struct.pack("<f", 0.5)),
        gguf_key("bool", 7, b"\x01"),
        gguf_key("string", 8, gguf_string("é")),
        gguf_key("u64", 10, struct.pack("<Q", 2**64 - 1)),
        gguf_key("i64", 11, struct.pack("<q", -(2**63))),
        gguf_key("f64", 12, struct.pack("<d", 1e300)),
        gguf_key("strings", 9, array(8, 3, gguf_string("a") + gguf_string("") + gguf_string("字"))),
        gguf_key("floats", 9, array(6, 2, struct.pack("<ff", 1.0, -2.0))),
        gguf_key("nested", 9, array(9, 2, array(4, 1, struct.pack("<I", 9)) + array(8, 1, gguf_string("x")))),
    ]
    file = GGUFFile(write(tmp_path / "f.gguf", gguf_bytes(keys)))
    plain = {key: value for key, value in file.metadata.items() if key not in ("floats", "nested")}
    assert plain == {
        "u8": 255, "i8": -1, "u16": 65535, "i16": -5, "u32": 2**32 - 1, "i32": -7, "f32": 0.5, "bool": True,
        "string": "é",
        "u64": 2**64 - 1, "i64": -(2**63), "f64": 1e300, "strings": ["a", "", "字"],
    }  # fmt: skip
    assert file.numbers("floats").tolist() == [1.0, -2.0]
    assert file.strings("strings") == ["a", "", "字"]
    assert (file.integer("i16"), file.number("u8"), file.flag("bool"), file.text("string")) == (-5, 255.0, True, "é")
    assert (file.integer("none", 3), file.flag("none", False), file.text("none", "")) == (3, False, "")
    for read, key in ((file.integer, "f32"), (file.text, "u8"), (file.flag, "u8"), (file.number, "bool")):
        with pytest.raises(ModelLoadError, match=f"metadata '{key}'"):
            read(key)
    with pytest.raises(ModelLoadError, match="have no 'none'"):
        file.integer("none")
    with pytest.raises(ModelLoadError, match="'nested'"):
        file.strings("nested")


def test_the_header_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", layers=2, extra={"tokenizer.ggml.tokens": ["a", "b"]})
    file, reader = GGUFFile(path), gguf.GGUFReader(path)
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert (ours.start, ours.nbytes, ours.type.code) == (theirs.data_offset, theirs.n_bytes, theirs.tensor_type)
        assert np.array_equal(file.raw(ours).reshape(-1), theirs.data.view(np.uint8).reshape(-1))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert file.metadata[key] == field.contents()


def test_reading_ends_with_close_but_metadata_stay(tmp_path: Path) -> None:
    file = GGUFFile(write_gguf(tmp_path / "m.gguf"))
    file.close()
    assert file.text("general.architecture") == "llama"
    with pytest.raises(ModelLoadError, match=r"after close\(\)"):
        file.raw(file.tensors["token_embd.weight"])
    with pytest.raises(ModelLoadError, match=r"after close\(\)"):
        file.digest()
