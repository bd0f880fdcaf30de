"""Runs that come from anybody: no link leads out of them, and no claim of theirs is believed."""

import asyncio
import io
import json
import logging
import os
import shutil
import sys
import threading
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import tensorstore

from probattn.inference import load_run
from probattn.inference.cli import main
from probattn.inference.cli.quiet import silence_libraries
from probattn.inference.config_files import read_config
from probattn.inference.runs.checkpoints import CheckpointError, CheckpointFolder, checksums
from probattn.inference.runs.files import RunError
from probattn.inference.runs.npz import read_arrays
from probattn.inference.runs.segments import Segment, SegmentError, SegmentFolder
from probattn.inference.runtime import memory
from probattn.inference.runtime.cores import cores
from tests.support.made_runs import (
    ARRAYS,
    CONFIG,
    CORPUS,
    VOCABULARY,
    create_run,
    draw,
    make_run,
)
from tests.support.refusals import refusal
from tests.support.tiny_run import files_of


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def elsewhere(tmp_path):
    """What lies outside of the run; nothing may happen to it."""
    folder = tmp_path / "elsewhere"
    (folder / "17").mkdir(parents=True)
    (folder / "17" / "thesis.tex").write_text("mine")
    (folder / "file").write_text("mine")
    before = files_of(folder)
    yield folder
    assert files_of(folder) == before


ENTRIES = [
    *("config.toml", "data.json", "metrics.jsonl", "summary.json", "lock", "post_hoc_prior.npz"),
    *("checkpoints", "checkpoints/best", "checkpoints/latest/8", "segments", "figures"),
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_link_is_refused_wherever_it_stands(run, elsewhere, entry):
    path = run.path / entry
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(elsewhere / "file" if "." in entry or entry == "lock" else elsewhere)
    reasons = {
        refusal(RunError, load_run, run.path),
        refusal(RunError, create_run, run.path, CONFIG, CORPUS, VOCABULARY, overwrite=True),
    }
    if entry != "config.toml":  # whose link leads to no configuration
        assert len(reasons) == 1
    assert all(reason.startswith(f"{path}: is a link") for reason in reasons)
    assert path.is_symlink()


def test_a_run_may_itself_be_reached_by_a_link(run, tmp_path):
    (tmp_path / "newest").symlink_to(run.path)
    assert load_run(tmp_path / "newest").step == 8


def test_a_pipe_is_refused_and_not_read_for_ever(run, capsys):
    (run.path / "summary.json").unlink()
    os.mkfifo(run.path / "summary.json")
    assert "is no file and no folder" in refusal(RunError, load_run, run.path)
    # Before the configuration is parsed for the flags' defaults, too.
    (run.path / "config.toml").unlink()
    os.mkfifo(run.path / "config.toml")
    assert main(["fit", "--out", str(run.path), "--resume"]) == 2
    assert "is no file and no folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.toml", "data.json", "metrics.jsonl", "summary.json"])
def test_a_description_that_is_too_large_is_not_read(run, name):
    with (run.path / name).open("r+b") as file:
        file.truncate(2**40)  # of which nothing is on disk
    assert refusal(RunError, load_run, run.path).startswith(f"{run.path / name}: has 1099511627776")


def test_a_configuration_of_many_dots_is_not_read(run):
    """To read it would take minutes: the square of their number."""
    config = run.path / "config.toml"
    config.write_text("a." * 100_000 + "a = 1\n")
    assert refusal(RunError, load_run, run.path).startswith(f"{config}: has 200006 bytes")
    message = refusal(ValueError, read_config, config)
    assert message == f"{config}: expected a TOML file: it has more than 16384 bytes"


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": ' * 100_000, b"9" * 10_000, b"\xff"])
def test_json_that_breaks_its_reader_is_damaged(run, content):
    (run.path / "summary.json").write_bytes(content)
    assert "summary.json: damaged: " in refusal(RunError, run.summary)
    (run.path / "metrics.jsonl").write_bytes(content + b"\n")
    assert "metrics.jsonl, line 1: expected " in refusal(RunError, run.metrics)


def test_an_error_does_not_steer_the_terminal(run, capsys):
    """Names in a run, and what its files say, are somebody else's."""
    (run.path / "a\x1b[2J\x9b2J").symlink_to("/")
    assert main(["evaluate", str(run.path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert "a\N{REPLACEMENT CHARACTER}[2J" in line


# Arrays in npz files


def archive_of(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def npy(shape, dtype="<f8", data=b""):
    stream = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + data


def test_arrays_come_back(tmp_path):
    arrays = {
        "draws/a.b": np.random.default_rng(0).normal(size=(2, 3)),
        "flag": np.bool_(True),
        "key": np.array([1, 2**32 - 1], np.uint32),
        "none": np.empty((0, 4), np.float32),
        "turned": np.asfortranarray(np.arange(6).reshape(2, 3)),
    }
    np.savez(tmp_path / "file.npz", **arrays)
    found = read_arrays(tmp_path / "file.npz", {name: a.shape for name, a in arrays.items()})
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy((2**40,)), "a claims to be of shape (1099511627776,) and has 128 bytes"),
        (npy((2**62, 4)), "a claims to be of shape"),
        (npy((2,), "<f8", b"\0" * 24), "a claims to be of shape (2,) and has 152 bytes"),
        (npy((1,), "|O", b"\0" * 8), "a is of object, expected numbers"),
        (npy((10**9,), "|S0"), "a is of |S0, expected numbers"),
        (npy((1,), "<M8[s]", b"\0" * 8), "a is of datetime64[s], expected numbers"),
        (npy((3,), "<f8", b"\0" * 24), "a has shape (3,), expected (2,)"),
        (b"", "EOF"),
    ],
)
def test_an_array_that_claims_what_it_is_not(tmp_path, data, reason):
    path = archive_of(tmp_path / "file.npz", {"a": data})
    assert reason in refusal(ValueError, read_arrays, path, {"a": (2,)})


def test_arrays_that_unpack_to_more_than_the_file(tmp_path, monkeypatch):
    packed = archive_of(
        tmp_path / "packed.npz",
        {"a": npy((10**6,), "<f8", b"\0" * 8 * 10**6)},
        compression=zipfile.ZIP_DEFLATED,
    )
    assert packed.stat().st_size < 10**5
    assert "it is compressed" in refusal(ValueError, read_arrays, packed)
    np.savez(tmp_path / "large.npz", a=np.zeros(1000))
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1}.get)
    assert "its arrays would take" in refusal(ValueError, read_arrays, tmp_path / "large.npz")


def test_arrays_whose_shapes_are_known_have_a_largest_size(tmp_path):
    path = tmp_path / "file.npz"
    np.savez(path, a=np.zeros(2))
    with path.open("r+b") as file:
        file.truncate(2**40)
    message = refusal(ValueError, read_arrays, path, {"a": (2,)})
    assert message == "it has 1099511627776 bytes, expected at most 65552"


def test_a_list_of_arrays_that_is_too_long_is_not_read(tmp_path):
    """Zipfile reads it whole, and takes many times as much memory."""
    path = archive_of(tmp_path / "file.npz", {f"{n}{'a' * 60_000}": npy((0,)) for n in range(20)})
    assert refusal(ValueError, read_arrays, path) == "its list of arrays is too long"


def test_a_segment_under_the_name_of_another_is_refused(tmp_path):
    folder = SegmentFolder(tmp_path)
    for first in (0, 4):
        folder.save(Segment(first, first + 4, {}, {"lp": np.empty((1, 4))}, {}, np.uint8(0)))
    assert [segment.cores for segment in folder.load()] == [cores()] * 2
    names = [tmp_path / "00000000-00000004.npz", tmp_path / "00000004-00000008.npz"]
    for source, target in ((names[0], "aside"), (names[1], names[0].name), ("aside", names[1])):
        (tmp_path / source).rename(tmp_path / target)
    message = refusal(SegmentError, lambda: list(folder.load()))
    assert message.startswith(f"{names[0]}: begins at iteration 4, whatever its name")


def test_a_segment_of_an_earlier_version_names_neither_its_place_nor_cores(tmp_path):
    folder = SegmentFolder(tmp_path)
    lp = np.empty((1, 4))
    np.savez(tmp_path / "00000000-00000004.npz", **{"statistics/lp": lp, "digest": np.uint8(0)})
    assert [segment.cores for segment in folder.load()] == [None]


def test_a_segment_of_objects_is_damaged_and_nothing_of_it_runs(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    folder = SegmentFolder(tmp_path)
    empty = np.empty((1, 4))
    folder.save(Segment(0, 4, {}, {"lp": empty}, {}, np.uint8(0)))
    assert [segment.stop for segment in folder.load()] == [4]
    payload = np.array([Payload()], dtype=object)
    np.savez(tmp_path / "00000000-00000004.npz", allow_pickle=True, digest=payload)
    message = refusal(SegmentError, lambda: list(folder.load()))
    assert "is of object, expected numbers" in message
    assert not (tmp_path / "executed").exists()


# Checkpoints


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointFolder(tmp_path / "latest")
    folder.save(3, ARRAYS)
    return folder


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": [2**40, 70]}, "array a.b is float64 (1099511627776, 70), expected float64"),
        ({"chunks": [2**20, 2**20]}, "array a.b of (90, 70) is in chunks of (1048576, 1048576)"),
        ({"dtype": "|O"}, 'Error reading "a.b/.zarray"'),
        ({"filters": [{"id": "pickle"}]}, 'Error reading "a.b/.zarray"'),
        ({"compressor": {"id": "zlib", "level": 1}}, 'Error reading "a.b/0.0"'),
        ({"chunks": [45, 70]}, "a.b"),  # of which the second is not there
    ],
)
def test_a_checkpoint_that_claims_what_it_is_not(folder, tmp_path, caplog, changes, reason):
    """With checksums that fit: whoever makes a checkpoint makes these too."""
    arrays = tmp_path / "latest" / "3" / "arrays"
    specification = {"driver": "ocdbt", "base": f"file://{arrays}/"}
    store = tensorstore.KvStore.open(specification).result()
    described = json.loads(store.read("a.b/.zarray").result().value) | changes
    store.write("a.b/.zarray", json.dumps(described).encode()).result()
    (arrays.parent / "SHA256SUMS").write_text(checksums(arrays), encoding="utf-8")
    assert reason in refusal(CheckpointError, folder.load, ARRAYS)
    assert [record.getMessage() for record in caplog.records] == []


def test_saving_and_loading_leave_the_process_as_it_was(folder):
    """Its hooks and its loggers are its own."""

    def state():
        loggers = [logging.getLogger(name) for name in (None, "absl", "asyncio")]
        hooks = (sys.unraisablehook, sys.excepthook, threading.excepthook)
        return hooks, [(each.level, each.filters[:], each.handlers[:]) for each in loggers]

    before = state()
    folder.load(ARRAYS)
    folder.save(4, ARRAYS)
    refusal(CheckpointError, folder.load, {})
    assert state() == before


def test_the_command_prints_no_traceback_of_what_is_read_too_late(monkeypatch, caplog):
    """After one array has failed, tensorstore calls the event loop that orbax closed."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    for name in ("absl", "asyncio"):
        caplog.set_level(logging.WARNING, logger=name)  # as it was, after the test
    closed = asyncio.new_event_loop()
    closed.close()
    with pytest.raises(RuntimeError) as late:
        closed.call_soon_threadsafe(print)
    others = [(late.value, print), (RuntimeError("another"), None), (None, None)]
    silence_libraries()
    for error, owner in [(late.value, None), *others]:
        sys.unraisablehook(SimpleNamespace(exc_value=error, object=owner))
    assert [(one.exc_value, one.object) for one in told] == others
    for name in ("absl", "asyncio"):
        logging.getLogger(name).error("told twice")
    assert caplog.records == []


def test_a_checkpoint_too_large_for_what_it_holds(folder, tmp_path):
    with (tmp_path / "latest" / "3" / "arrays" / "manifest.ocdbt").open("r+b") as file:
        file.truncate(2**40)
    assert "it has 1099" in refusal(CheckpointError, folder.load, ARRAYS)


def test_checksums_that_are_too_large_are_not_read(folder, tmp_path):
    with (tmp_path / "latest" / "3" / "SHA256SUMS").open("r+b") as file:
        file.truncate(2**40)
    assert "SHA256SUMS has more than" in refusal(CheckpointError, folder.load, ARRAYS)


def test_a_configuration_too_large_for_the_machine(run):
    """Whatever its checkpoint holds: arrays of that size are never made."""
    text = (run.path / "config.toml").read_text(encoding="utf-8")
    huge = text.replace("\nwidth = 8\n", "\nwidth = 8000000\n")
    (run.path / "config.toml").write_text(huge, encoding="utf-8")
    assert huge != text
    message = refusal(CheckpointError, lambda: load_run(run.path).parameters)
    assert "its arrays would take" in message
    assert "GiB of this machine's memory" in message


def test_what_a_kill_leaves_is_put_away_by_the_next_to_write(run):
    left = [
        ".summary.json.0123abcd",
        "segments/.00000000-00000004.npz.0123abcd",
        "figures/.noise.png.0123abcd",
    ]
    others = ["figures/.mine.png.0123abcd", "figures/noise.png", "segments/.notes.0123abcd"]
    for name in left + others:
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text("")
    for step in ("4", "9.saving"):
        shutil.copytree(run.path / "checkpoints/best/8", run.path / "checkpoints/best" / step)
    with run.lock(), run.lock():  # a thread may hold it twice
        names = files_of(run.path).keys()
    assert set(others) <= names
    assert not set(left) & names
    assert not (run.path / "checkpoints/best/9.saving").exists()
    run.best.tidy()
    assert [path.name for path in (run.path / "checkpoints/best").iterdir()] == ["8"]
    assert run.parameters.keys() == draw(run.parameter_shapes()).keys()
