"""GGUF files against the package `gguf`, and files that claim what they do not hold."""

import struct

import gguf as library
import numpy as np
import pytest

from probattn.inference.pretrained.errors import PretrainedError
from probattn.inference.pretrained.gguf_blocks import FORMATS, OTHER_FORMATS
from probattn.inference.pretrained.gguf_files import open_gguf
from tests.support.gguf_bytes import ARRAY, STRING, gguf, key, tensor, text
from tests.support.refusals import refusal

ONE = tensor("a", [2, 32], 0, 0)


def opened(path, data):
    path.write_bytes(data)
    return open_gguf(path)


def test_the_formats_are_those_of_the_package():
    sizes = library.GGML_QUANT_SIZES
    for number, each in FORMATS.items():
        kind = library.GGMLQuantizationType(number)
        assert (each.name, (each.numbers, each.size)) == (kind.name, sizes[kind])
    for number, name in OTHER_FORMATS.items():
        assert library.GGMLQuantizationType(number).name == name


@pytest.mark.parametrize("kind", [each.name for each in FORMATS.values()])
def test_values_equal_those_of_the_package_bit_by_bit(tmp_path, kind):
    number = library.GGMLQuantizationType[kind]
    rng = np.random.default_rng(int(number))
    values = (rng.normal(size=(3, 5, 96)) * 10.0 ** rng.integers(-6, 3, (3, 5, 1))).astype(
        np.float32
    )
    path = tmp_path / "model.gguf"
    writer = library.GGUFWriter(path, "llama")
    stored = library.quantize(values, number)
    if kind in ("Q8_0", "Q4_0", "Q4_1"):  # of which every byte but those of a scale is a value
        blocks = stored.reshape(-1, FORMATS[number].size)
        blocks[:, 4:] = rng.integers(0, 256, blocks[:, 4:].shape)
    writer.add_tensor("other", np.arange(7, dtype=np.float32))
    writer.add_tensor("a", stored, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_gguf(path).tensors
    assert found.entries["a"].shape == found["a"].shape == values.shape
    assert found.entries["a"].dtype == found["a"].dtype
    expected = library.dequantize(stored, number).astype(np.float32)
    assert found["a"].astype(np.float32).tobytes() == expected.tobytes()
    np.testing.assert_array_equal(found["other"], np.arange(7))


def test_four_bits_by_hand(tmp_path):
    """Number i of a block is the lower half of byte i, number i + 16 the upper one."""
    codes = np.arange(32) % 16
    packed = bytes(int(codes[i] | codes[i + 16] << 4) for i in range(16))
    scale, least = np.float16(0.25).tobytes(), np.float16(-3).tobytes()
    tensors = [tensor("zero", [32], 2, 0), tensor("one", [32], 3, 32)]
    data = (scale + packed).ljust(32, b"\0") + scale + least + packed
    found = opened(tmp_path / "x.gguf", gguf([], tensors, data)).tensors
    np.testing.assert_array_equal(found["zero"], 0.25 * (codes - 8))
    np.testing.assert_array_equal(found["one"], 0.25 * codes - 3)


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_type(tmp_path, version):
    keys = [
        key("u8", 0, 200),
        key("u32", 4, 7),
        key("i32", 5, -7),
        key("f32", 6, 0.5),
        key("bool", 7, True),
        key("text", STRING, "é\n"),
        key("u64", 10, 2**40),
        key("f64", 12, 0.1),
        key("texts", ARRAY, (STRING, ["a", "", "ü"])),
        key("numbers", ARRAY, (5, [1, -2, 3])),
    ]
    found = opened(tmp_path / "x.gguf", gguf(keys, version=version)).metadata
    assert found.pop("numbers").tolist() == [1, -2, 3]
    assert found == {
        **{"u8": 200, "u32": 7, "i32": -7, "f32": 0.5, "bool": True, "text": "é\n"},
        **{"u64": 2**40, "f64": 0.1, "texts": ["a", "", "ü"]},
    }


def test_an_alignment_of_its_own(tmp_path):
    keys = [key("general.alignment", 4, 128)]
    data = np.arange(64, dtype=np.float32).tobytes()
    found = opened(tmp_path / "x.gguf", gguf(keys, [ONE], data, alignment=128)).tensors
    np.testing.assert_array_equal(found["a"], np.arange(64).reshape(2, 32))


HUGE = 2**63
WRONG = {
    "empty": (b"", "is empty"),
    "another kind": (b"PK\3\4" + bytes(60), "does not begin with GGUF"),
    "version 1": (gguf(version=1), "is of version 1: expected version 2 or 3"),
    "big-endian": (gguf(version=3 << 24), "is big-endian: expected version 2 or 3, little-endian"),
    "cut": (gguf()[:20], "claims 8 bytes where 4 are left"),
    "tensors": (gguf(counts=(HUGE, 0), data=bytes(99)), f"claims {HUGE} tensors: expected at most"),
    "keys": (gguf(counts=(0, HUGE), data=bytes(99)), f"claims {HUGE} metadata keys: expected at"),
    "a name": (gguf([struct.pack("<Q", HUGE)], data=bytes(32)), f"claims a text of {HUGE} bytes"),
    "a text": (gguf([text("k") + struct.pack("<IQ", 8, 2**20)]), "claims 1048576 bytes where"),
    "texts": (gguf([text("k") + struct.pack("<IIQ", 9, 8, HUGE)]), f"claims {HUGE} texts"),
    "numbers": (
        gguf([text("k") + struct.pack("<IIQ", 9, 4, HUGE)]),
        f"claims {4 * HUGE} bytes where",
    ),
    "nesting": (
        gguf([text("k") + struct.pack("<II", 9, 9) + struct.pack("<QI", 1, 9) * 10_000]),
        "an array of type 9: expected one of numbers or texts",
    ),
    "tensors beyond the end": (gguf(counts=(9, 0)), "bytes where"),
    "texts beyond the end": (gguf([text("k") + struct.pack("<IIQ", 9, 8, 999)]), "bytes where"),
    "a type": (gguf([text("k") + struct.pack("<I", 77)], data=bytes(9)), "a value of type 77"),
    "no UTF-8": (gguf([key("k", STRING, b"\xff")]), "a text that is not UTF-8"),
    "a key twice": (
        gguf([key("k", 4, 1)] * 2),
        "holds the metadata key 'k' twice: expected",
    ),
    "alignment 0": (
        gguf([key("general.alignment", 4, 0)]),
        "has the alignment 0: expected a",
    ),
    "alignment 3": (
        gguf([key("general.alignment", 4, 3)]),
        "has the alignment 3: expected a",
    ),
    "alignment x": (gguf([key("general.alignment", 8, "x")]), "has the alignment 'x': expected a"),
    "no dimension": (gguf([], [tensor("a", [], 0, 0)]), "has 0 dimensions: expected 1 to 4"),
    "dimensions": (gguf([], [tensor("a", [1] * 5, 0, 0)]), "has 5 dimensions: expected 1 to 4"),
    "no element": (gguf([], [tensor("a", [0, 4], 0, 0)]), "has the shape (0, 4): expected rows"),
    "rows": (gguf([], [tensor("a", [33], 8, 0)]), "(33,): expected rows of a multiple of 32"),
    "K-quants": (
        gguf([], [tensor("a", [256], 12, 0)]),
        "its tensor 'a' is of Q4_K: expected one of F32, F16, Q4_0, Q4_1, Q8_0, BF16; choose a",
    ),
    "new quants": (gguf([], [tensor("a", [256], 999, 0)]), "is of type 999: expected one of F32"),
    "beyond the end": (gguf([], [ONE], bytes(255)), "it is truncated or damaged"),
    "offset": (gguf([], [tensor("a", [8], 0, HUGE)], bytes(32)), "it is truncated or damaged"),
    "size": (gguf([], [tensor("a", [HUGE, HUGE], 0, 0)], bytes(32)), "it is truncated or damaged"),
    "unaligned": (
        gguf([], [tensor("a", [8], 0, 8)], bytes(64)),
        "begins at 8: expected a",
    ),
    "overlap": (gguf([], [ONE, tensor("b", [8], 0, 32)], bytes(256)), "begins at 32: expected a"),
    "a tensor twice": (
        gguf([], [ONE, tensor("a", [8], 0, 256)], bytes(288)),
        "holds the tensor 'a' twice: expected it once",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, case):
    path = tmp_path / "x.gguf"
    data, reason = WRONG[case]
    message = refusal(PretrainedError, opened, path, data)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert message.isprintable()


def test_a_file_that_is_not_there_or_no_file(tmp_path):
    path = tmp_path / "x.gguf"
    assert "cannot be read: No such file" in refusal(PretrainedError, open_gguf, path)
    path.mkdir()
    assert "cannot be read: Is a directory" in refusal(PretrainedError, open_gguf, path)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    whole = gguf([key("k", ARRAY, (STRING, ["a", "b"]))], [ONE], bytes(256))
    opened(tmp_path / "x.gguf", whole)
    for length in [*range(1, len(whole), 7), len(whole) - 1]:
        refusal(PretrainedError, opened, tmp_path / "x.gguf", whole[:length])
