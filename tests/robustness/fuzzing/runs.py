"""Targets: a run directory whose files are damaged or forged, and the reader of metrics.jsonl."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from probattn.inference.config import FitConfig, RunConfig
from probattn.inference.config_files import format_config
from probattn.inference.evaluation.post_hoc import post_hoc_prior
from probattn.inference.runs.checks import check_same_corpus
from probattn.inference.runs.run import Run, load_run
from probattn.inference.runs.segments import Segment, SegmentFolder
from probattn.models import LanguageModelConfig
from probattn.text.corpora import Corpus
from probattn.text.vocabulary import CharacterVocabulary
from tests.robustness.fuzzing.material import edited, edits, integers, json_values, same
from tests.robustness.fuzzing.target import Target, refused, require
from tests.support.made_runs import create_run

_TEXT = "a text with \u00e9, 'quotes' and\na second line"
_CORPUS = Corpus("text", _TEXT, _TEXT[::-1], "file text")
_CONFIG = RunConfig(
    model=LanguageModelConfig(layers=1, heads=1, width=2, block=4, prior_rank=1), fit=FitConfig()
)
_ROWS: list[dict[str, Any]] = [
    {"step": 4, "loss": 3.25, "tokens_per_s": None},
    {"step": 8, "loss": 1e-300},
    {"step": 9, "stopped": "the loss is nan"},
]
_CHECKPOINTS = 50  # of so many damaged runs the checkpoint is read in one: it takes long


# Parts of a run that no checksum guards, by file.
_UNGUARDED = {"config.toml": "config", "data.json": "data", "summary.json": "summary"}


def _make(path: Path) -> Run:
    """A run as a fit leaves it, with a prior and segments of draws beside."""
    run = create_run(path, _CONFIG, _CORPUS, CharacterVocabulary.from_text(_TEXT))
    for row in _ROWS:
        run.append_metrics(row)
    rng = np.random.default_rng(0)
    run.best.save(
        8, {name: jnp.asarray(rng.normal(size=s.shape), s.dtype) for name, s in _shapes(run)}
    )
    run.update_summary(fit={"steps": 8})
    prior = {"w_query": rng.normal(size=(2, 1)), "w_key": rng.normal(size=(2, 1)), "scale": 1.5}
    counts = {"log_density": -1.0, "converged": True, "steps": 3, "tokens": 8, "of_step": 8}
    rest = {"gradient_norm": 1e-4, "disagreement": 1e-3}
    np.savez(path / "post_hoc_prior.npz", allow_pickle=False, **prior, **counts, **rest)
    for first in (0, 3):
        draws = {"a.b": rng.normal(size=(2, 3, 2))}
        statistics = {"lp": rng.normal(size=(2, 3))}
        SegmentFolder(path / "segments").save(
            Segment(first, first + 3, draws, statistics, {"0": np.arange(2)}, np.uint8(7))
        )
    return run


def _shapes(run: Run) -> Any:
    return run.parameter_shapes().items()


def _read_all(run: Run, *, checkpoint: bool) -> dict[str, Any]:
    """Everything that a run holds, as its readers give it."""
    segments = SegmentFolder(run.path / "segments")
    found = {
        "config": format_config(run.config),
        "data": {**run.data, "vocabulary": run.vocabulary.to_dict()},
        "metrics": run.metrics(),
        "stopped": run.stopped,
        "summary": run.summary(),
        "prior": vars(post_hoc_prior(run)),
        "segments": [vars(segment) for segment in segments.load()],
    }
    check_same_corpus(run, _CORPUS)
    if checkpoint:
        found["parameters"] = {name: np.asarray(leaf) for name, leaf in run.parameters.items()}
    return found


def run(folder: Path) -> Target:
    """Files of a run edited, emptied, removed, or replaced by a folder, a link or a pipe.

    Arrays and JSON are forged too: with checksums that fit, and with values of other types.
    """
    made = _make(folder / "run")
    expected = _read_all(made, checkpoint=True)
    files = sorted(path for path in made.path.rglob("*") if path.is_file() and path.name != "lock")
    contents = {path: path.read_bytes() for path in files}
    plain = [path for path in files if "checkpoints" not in path.parts]
    arrays = [path for path in files if path.suffix == ".npz"]

    def check(given: tuple[str, int, Any, int]) -> str:
        how, which, what, turn = given
        pool = {"forged": arrays, "value": [made.path / "data.json", made.path / "summary.json"]}
        path = pool.get(how, files if turn == 0 else plain)
        damaged = path[which % len(path)]
        try:
            _damage(damaged, how, what, contents[damaged])
            return _open(damaged, how, checkpoint=turn == 0)
        finally:
            _remove(damaged)
            damaged.parent.mkdir(parents=True, exist_ok=True)
            damaged.write_bytes(contents[damaged])

    def _open(damaged: Path, how: str, *, checkpoint: bool) -> str:
        try:
            found = _read_all(load_run(made.path), checkpoint=checkpoint)
        except ValueError as error:
            return refused(error)
        # What no checksum guards may hold another value, a changed digit of the configuration too;
        # all else must be what was saved.
        guarded = how not in ("value", "forged") and damaged.suffix != ".jsonl"
        for name, value in found.items():
            loose = _UNGUARDED.get(damaged.name)
            if (how, name) == ("removed", "segments"):  # the last may be one to come
                require(_same(value, expected[name][: len(value)]), "segments out of order")
            elif guarded and name != loose:
                require(_same(value, expected[name]), f"{name} is {value}, was {expected[name]}")
        return "accepted"

    inputs = st.one_of(
        st.tuples(st.just("edited"), st.integers(0, 99), edits, st.integers(0, _CHECKPOINTS - 1)),
        st.tuples(
            st.sampled_from(["removed", "emptied", "folder", "link", "pipe"]),
            st.integers(0, 99),
            st.none(),
            st.integers(0, _CHECKPOINTS - 1),
        ),
        st.tuples(st.just("forged"), st.integers(0, 9), edits, st.just(1)),
        st.tuples(
            st.just("value"),
            st.integers(0, 1),
            st.dictionaries(
                st.sampled_from(
                    ["name", "sha256", "description", "train_characters", "vocabulary"]
                ),
                json_values,
                min_size=1,
                max_size=2,
            ),
            st.just(1),
        ),
    )
    return Target("run", inputs, check)


def _damage(path: Path, how: str, what: Any, content: bytes) -> None:
    if how in ("removed", "folder", "link", "pipe"):
        path.unlink()
    replace: dict[str, Callable[[], object]] = {
        "edited": lambda: path.write_bytes(edited(content, what)),
        "emptied": lambda: path.write_bytes(b""),
        "folder": path.mkdir,
        "link": lambda: path.symlink_to("/dev/zero"),
        "pipe": lambda: os.mkfifo(path),
        "forged": lambda: path.write_bytes(_forged(content, what)),
        "value": lambda: path.write_text(json.dumps(json.loads(content) | what)),
    }
    replace.get(how, lambda: None)()


def _forged(content: bytes, changes: Any) -> bytes:
    """An npz file of which one member was edited, and its checksums made again."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        names = old.namelist()
        chosen = names[int(changes[0][1] * len(names))]
        for name in names:
            data = old.read(name)
            new.writestr(name, edited(data, changes) if name == chosen else data)
    return stream.getvalue()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _same(left: Any, right: Any) -> bool:
    """Values equal, arrays bit by bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, np.ndarray):
        return (left.dtype, left.shape, left.tobytes()) == (
            right.dtype,
            right.shape,
            right.tobytes(),
        )
    return same(left, right)


_line = st.one_of(
    st.fixed_dictionaries(
        {"step": integers},
        optional={"loss": json_values, "stopped": json_values, "bpc": json_values},
    ).map(lambda row: json.dumps(row).encode() if _short(row) else b"9" * 5000),
    json_values.map(lambda value: json.dumps(value).encode() if _short(value) else b"9" * 5000),
    st.binary(max_size=12),
)


def _short(value: Any) -> bool:
    try:
        json.dumps(value)
    except ValueError:  # an integer of more digits than Python writes
        return False
    return True


def metrics(folder: Path) -> Target:
    """Lines of any JSON and of any bytes, a torn last one, and edits of the bytes of all."""
    made = create_run(folder / "run", _CONFIG, _CORPUS, CharacterVocabulary.from_text(_TEXT))
    path = made.path / "metrics.jsonl"

    def check(given: tuple[list[bytes], bytes, list | None]) -> str:
        lines, torn, changes = given
        data = b"".join(line + b"\n" for line in lines) + torn
        data = data if changes is None else edited(data, changes)
        path.write_bytes(data)
        try:
            found, stopped = made.metrics(), made.stopped
        except ValueError as error:
            return refused(error, named=f"{path}, line ")
        rows = [json.loads(line) for line in data.split(b"\n")[:-1]]
        require(same(found, [row for row in rows if "stopped" not in row]), f"{found} of {rows}")
        last = rows[-1] if rows else {}
        require(
            stopped is None if "stopped" not in last else isinstance(stopped, tuple),
            f"stopped is {stopped} of {last}",
        )
        if stopped is not None:
            require(same(list(stopped), [last["step"], last["stopped"]]), f"{stopped} of {last}")
            require(isinstance(stopped[1], str), f"the reason is {stopped[1]!r}")
        return "accepted"

    inputs = st.tuples(
        st.lists(_line, max_size=4), st.one_of(st.just(b""), _line), st.one_of(st.none(), edits)
    )
    return Target("metrics", inputs, check)
