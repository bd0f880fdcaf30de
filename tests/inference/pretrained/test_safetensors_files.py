"""Tensors of .safetensors files, one or several, right and wrong."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from probattn.inference.pretrained import safetensors_files, tensors
from probattn.inference.pretrained.errors import PretrainedError
from probattn.inference.runtime import memory
from tests.support.refusals import refusal

RNG = np.random.default_rng(0)
ARRAYS = {
    "a": RNG.normal(size=(3, 4)).astype(np.float32),
    "b": RNG.normal(size=5).astype(ml_dtypes.bfloat16),
    "c": RNG.normal(size=(2, 1, 2)).astype(np.float16),
    "mask": np.array([[True, False]]),
}


def raw(path, header, data=b"", *, length=None):
    """A file whose header says what is given, and claims to be as long as is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + text + data)


def described(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def index(folder, **files):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def same(found, wanted):
    assert {name: each.shape for name, each in found.entries.items()} == {
        name: each.shape for name, each in wanted.items()
    }
    for name, each in wanted.items():
        assert found.entries[name].dtype == found[name].dtype == each.dtype
        assert found[name].tobytes() == each.tobytes()


def test_a_file_gives_back_what_was_saved_bit_by_bit(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors", metadata={"format": "np"})
    same(safetensors_files.open_folder(tmp_path), ARRAYS)


@pytest.mark.parametrize("indexed", [True, False])
def test_several_files_are_one_checkpoint(tmp_path, indexed):
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file({"a": ARRAYS["a"]}, tmp_path / names[0])
    rest = {name: each for name, each in ARRAYS.items() if name != "a"}
    save_file(rest, tmp_path / names[1])
    if indexed:
        index(tmp_path, a=names[0], **dict.fromkeys(rest, names[1]))
    same(safetensors_files.open_folder(tmp_path), ARRAYS)


def test_a_tensor_is_read_when_it_is_asked_for_and_only_if_memory_holds_it(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path)
    found = safetensors_files.open_file(path)
    monkeypatch.setattr(memory, "host_memory", lambda: 40)
    message = refusal(ValueError, found.__getitem__, "a")  # 48 bytes
    assert message.startswith("the tensor a would take ")
    assert found["b"].tobytes() == ARRAYS["b"].tobytes()


def test_reading_a_name_that_is_not_there_is_a_key_error():
    with pytest.raises(KeyError):
        tensors.Tensors({})["a"]


WRONG = {
    "cut in the data": (lambda path: raw(path, {"a": described([2], 0, 8)}, b"1234567"), "damaged"),
    "more data": (lambda path: raw(path, {"a": described([2], 0, 8)}, b"123456789"), "damaged"),
    "cut in the header": (lambda path: raw(path, {"a": 1}, length=1000), "damaged"),
    "header beyond all": (lambda path: raw(path, {}, length=2**63), "damaged"),
    "shape beyond all": (
        lambda path: raw(path, {"a": described([2**62, 8], 0, 8)}, bytes(8)),
        "damaged",
    ),
    "overlap": (
        lambda path: raw(path, {"a": described([2], 0, 8), "b": described([2], 0, 8)}, bytes(8)),
        "damaged",
    ),
    "one name twice": (
        lambda path: raw(
            path,
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b'"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}',
            bytes(8),
        ),
        "names 'a' twice: expected each name once",
    ),
    "another dtype": (
        lambda path: raw(path, {"a": described([8], 0, 8, "F8_E4M3")}, bytes(8)),
        "its tensor 'a' is of F8_E4M3: expected one of F64, F32, F16, BF16, I64",
    ),
    "nesting": (lambda path: raw(path, b"[" * 100_000), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "no file": (lambda path: path.mkdir(), "cannot be read: Is a directory"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, case):
    path = tmp_path / "model.safetensors"
    make, reason = WRONG[case]
    make(path)
    message = refusal(PretrainedError, safetensors_files.open_folder, tmp_path)
    assert message.startswith(f"{path}: ")
    assert reason in message


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "a\\b.safetensors", "x.bin", 7],
)
def test_an_index_names_only_files_beside_it(tmp_path, file):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": ARRAYS["a"]}, tmp_path / "secret.safetensors")
    index(folder, a=file)
    message = refusal(PretrainedError, safetensors_files.open_folder, folder)
    assert message.startswith(f"{folder}/model.safetensors.index.json: names ")
    assert message.endswith("expected a file *.safetensors in the folder of the index")


@pytest.mark.parametrize(
    ("files", "says", "reason"),
    [
        ({}, {"a": "x.safetensors"}, "names x.safetensors, which is missing"),
        ({"x": "a"}, {"a": "x", "b": "x"}, "says that x.safetensors holds 'b', which it does not"),
        ({"x": "ab"}, {"a": "x"}, "does not name the tensor 'b', which a file holds"),
        ({"x": "a", "y": "ab"}, {"a": "x", "b": "y"}, "holds 'a' twice, in x.safetensors and y."),
        ({}, {}, "has no weight_map"),
        ({"model-00001-of-00003": "a"}, None, "holds 1 of 3 files model-*.safetensors"),
        ({}, None, "holds no tensors: expected model.safetensors, or "),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, files, says, reason):
    for name, held in files.items():
        save_file({each: ARRAYS[each] for each in held}, tmp_path / f"{name}.safetensors")
    if says is not None:
        index(tmp_path, **{n: f"{each.split('.')[0]}.safetensors" for n, each in says.items()})
    assert reason in refusal(PretrainedError, safetensors_files.open_folder, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_never_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nmkdir\n(S'executed'\ntR.")
    message = refusal(PretrainedError, safetensors_files.open_folder, tmp_path)
    assert message.startswith(f"{tmp_path / name}: is a pickle, which can run any code")
    assert "choose a revision that has them, or convert it" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
