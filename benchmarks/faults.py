"""Kill `probattn fit`, `sample` and `evaluate` anywhere, go on, and compare with runs left alone.

    python benchmarks/faults.py [--kills 200] [--seed 0] [--only fit sample evaluate]

Half of the kills come at a random moment. The others come from within: the process kills itself
when it opens, renames, removes or syncs the n-th file of its run, n random; at a sync it first cuts
off a random part of what was not synced before, as a machine that dies may. Every run is killed up
to three times before it may end. After each kill every file must be whole. In the end parameters,
optimizer state, draws and metrics must be those of the run left alone, to the last bit, and nothing
else may lie there; only times of day and durations differ.
"""

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from harness import environment

PRELOADED = ["probattn.inference.cli", "probattn.inference.plots", "probattn.inference.to_arviz"]
WORDS = ("the token", "of a", "margin", "and", "[so]", "on, with", "\n")
MODEL = [
    *("--model.layers", "1", "--model.heads", "2", "--model.width", "8", "--model.block", "8"),
    *("--model.prior-rank", "2", "--objective", "margin"),
]
FIT = [
    *("--fit.steps", "60", "--fit.batch", "4", "--fit.warmup", "5"),
    *("--fit.eval-every", "10", "--fit.checkpoint-every", "6"),
]
SAMPLE = [
    *("--data.tokenizer", "frequent:4", "--latent.width", "2", "--latent.sequences", "2"),
    *("--latent.length", "6", "--sample.chains", "2", "--sample.warmup", "40"),
    *("--sample.draws", "40"),
]
EVALUATE = ["--noise-absolute", "0.5", "--noise-relative", "1"]
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
MOST = 3  # kills of one run


@dataclass
class Outcome:
    """What the kills of one command came to.

    Attributes:
        kills: how many, by what the process was doing, or "at a time".
        runs: that were killed and then brought to their end.
        seconds: of the command left alone, its imports apart.
        torn: files that were not whole after a kill.
        differences: what a run had in the end that the one left alone had not, or otherwise.
        failures: commands that ended with another status than 0, and their last line.
    """

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    seconds: float = math.nan
    torn: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Laboratory:
    """Processes in which commands run and are killed.

    They are forked from one that has imported everything and has started no thread; what they
    compile is kept on disk.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "MPLBACKEND": "Agg",
            # The killed leave semaphores of their progress bars, which the last process removes.
            "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
        }
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        words = random.Random(0)
        text = "".join(WORDS) + " ".join(words.choice(WORDS) for _ in range(600))
        (folder / "corpus.txt").write_text(text, encoding="utf-8")

    def run(
        self, arguments: list[str], run: Path, *, at: int = 0, after: float | None = None
    ) -> tuple[int, list[str]]:
        """Run a command, killed at an event (counted from 1) or after seconds, or not at all.

        Returns:
            Its exit status, negative for a signal, and the lines that it printed: the last is the
            event at which it was killed, or the number of events if it was not.
        """
        log = self.folder / "log.txt"
        log.write_bytes(b"")
        process = self._context.Process(
            target=_command, args=(arguments, str(run), str(log), at, self.rng.random())
        )
        process.start()
        process.join(after)
        if process.is_alive():
            process.kill()
            process.join()
        status = process.exitcode
        process.close()
        assert status is not None
        return status, log.read_text(encoding="utf-8", errors="replace").splitlines()


def _command(arguments: list[str], run: str, log: str, at: int, seed: float) -> None:
    """In a process of its own: one command of `probattn`, which may kill itself."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    # Fifty segments in place of one every half a minute.
    sys.modules["probattn.inference.nuts"]._SAVE_SECONDS = 0.0
    sys.modules["probattn.inference.nuts"]._CALL_SECONDS = 0.0
    count = _arm(run, at, random.Random(seed))
    status = sys.modules["probattn.inference.cli"].main(arguments)
    print(f"events: {next(count) - 1}", flush=True)
    os._exit(status)


def _arm(run: str, at: int, rng: random.Random) -> "itertools.count[int]":
    """Kill this process at an event of its run; the counter of events."""
    count, synced, sync = itertools.count(1), dict[int, int](), os.fsync

    def happens(name: str, path: object, descriptor: int | None = None) -> None:
        if not str(path).startswith(run) or next(count) != at:
            return
        if descriptor is not None and Path(str(path)).is_file():
            known = os.fstat(descriptor)
            safe = min(synced.get(known.st_ino, 0), known.st_size)  # it may have become shorter
            os.truncate(str(path), rng.randint(safe, known.st_size))
        relative = str(path)[len(run) + 1 :]
        print(f"\n{name} {relative}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event in EVENTS and isinstance(arguments[0], str | os.PathLike):
            happens(event, os.fspath(arguments[0]))

    def fsync(descriptor: int) -> None:
        happens("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), descriptor)
        sync(descriptor)
        known = os.fstat(descriptor)
        synced[known.st_ino] = known.st_size

    if Path(run, "metrics.jsonl").exists():  # of a process before, which had synced it
        known = os.stat(Path(run, "metrics.jsonl"))
        synced[known.st_ino] = known.st_size
    os.fsync = fsync
    sys.addaudithook(audit)
    return count


# What a run must hold


def check_whole(run: Path) -> list[str]:
    """Files of a run, the temporary ones aside, that cannot be read to their end."""
    torn = []
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_dir() or name == "lock" or any(part[0] == "." for part in Path(name).parts):
            continue
        if name.startswith("checkpoints/"):
            if path.name.startswith("SHA256SUMS") and _is_newest(path.parent):
                torn += [f"{name}: {each}" for each in _changed(path)]
            continue
        try:
            READERS[path.suffix](path)
        except Exception as error:
            torn.append(f"{name}: {type(error).__name__} {error}")
    return torn


def _is_newest(checkpoint: Path) -> bool:
    """Whether it is whole by its name, and not an older one, whose removal a kill may cut short."""
    steps = [int(each.name) for each in checkpoint.parent.iterdir() if each.name.isdecimal()]
    return checkpoint.name.isdecimal() and int(checkpoint.name) == max(steps)


def _changed(sums: Path) -> list[str]:
    lines = [line.split("  ", 1) for line in sums.read_text(encoding="utf-8").splitlines()]
    return [
        name
        for digest, name in lines
        if hashlib.sha256((sums.parent / name).read_bytes()).hexdigest() != digest
    ]


def _read_lines(path: Path) -> None:
    """All but a last line without its end, which is what a kill may leave."""
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        json.loads(line)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def _read_netcdf(path: Path) -> None:
    import xarray as xr

    with xr.open_datatree(path) as tree:
        tree.load()


def _read_csv(path: Path) -> None:
    if not path.read_bytes().endswith(b"\n"):
        raise ValueError("no end")


def _read_png(path: Path) -> None:
    if not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
        raise ValueError("no end")


READERS: dict[str, Callable[[Path], Any]] = {
    ".toml": lambda path: tomllib.loads(path.read_text(encoding="utf-8")),
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".jsonl": _read_lines,
    ".npz": _read_arrays,
    ".nc": _read_netcdf,
    ".csv": _read_csv,
    ".png": _read_png,
}


def outcome_of_fit(run: Path) -> dict[str, Any]:
    """All numbers of a fit but its speed, and the names of all its files."""
    import orbax.checkpoint as ocp

    found: dict[str, Any] = {}
    for folder in sorted((run / "checkpoints").iterdir()):
        for step in folder.iterdir():
            with ocp.StandardCheckpointer() as checkpointer:
                arrays = checkpointer.restore((step / "arrays").absolute())
            for name, leaf in arrays.items():
                found[f"{folder.name} {step.name} {name}"] = _bits(leaf)
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, rows):
        row.pop("tokens_per_s")
        found[f"metrics of step {row['step']}"] = row
    found["metrics"] = [json.loads(row)["step"] for row in rows]
    found["summary"] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    found["files"] = [name for name in _names(run) if not name.startswith("checkpoints/")]
    return found


def outcome_of_sample(run: Path) -> dict[str, Any]:
    """All draws and statistics but the seconds, the last state, and the names of files."""
    found: dict[str, Any] = {}
    segments = [_read_arrays(path) for path in sorted((run / "segments").glob("[0-9]*.npz"))]
    for key in segments[0]:
        if key.startswith(("draws/", "statistics/")) and not key.endswith("/seconds"):
            found[key] = _bits(np.concatenate([segment[key] for segment in segments], axis=1))
        elif not key.endswith("/seconds"):
            found[key] = _bits(segments[-1][key])
    names = _names(run)
    found["files"] = [name for name in names if not name.startswith("segments/")]
    found["left over"] = [name for name in names if "/." in name]
    return found


def outcome_of_evaluate(run: Path) -> dict[str, Any]:
    """Every file, to the last byte."""
    return {name: _bits(np.fromfile(run / name, np.uint8)) for name in _names(run)}


def _names(run: Path) -> list[str]:
    return sorted(
        path.relative_to(run).as_posix()
        for path in run.rglob("*")
        if path.is_file() and path.name != "lock"
    )


def _bits(leaf: Any) -> str:
    array = np.ascontiguousarray(leaf)
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return f"{array.dtype} {array.shape} {digest}"


# The three commands


def faults(laboratory: Laboratory, name: str, kills: int) -> Outcome:
    """Kill one of the commands so many times."""
    folder, rng, outcome = laboratory.folder, laboratory.rng, Outcome()
    whole = folder / name / "whole" / "run"  # a figure bears the name of its run
    source = str(folder / "corpus.txt")
    if name == "fit":
        begin = ["fit", "--data", source, *MODEL, *FIT]
        outcome_of = outcome_of_fit
    elif name == "sample":
        begin = ["sample", "--data", source, *SAMPLE]
        outcome_of = outcome_of_sample
    else:
        begin, outcome_of = ["evaluate"], outcome_of_evaluate
        status, lines = laboratory.run(
            ["fit", "--data", source, *MODEL, *FIT, "--out", str(folder / "fitted")], folder
        )
        if status:
            raise RuntimeError(f"fit of the run to evaluate: status {status}: {lines[-1]}")

    def arguments(run: Path) -> list[str]:
        if name == "evaluate":
            return ["evaluate", str(run), *EVALUATE]
        if (run / "config.toml").exists():
            return [name, "--out", str(run), "--resume"]
        return [*begin, "--out", str(run)]

    def prepare(run: Path) -> None:
        run.parent.mkdir(parents=True)
        if name == "evaluate":
            shutil.copytree(folder / "fitted", run)

    for attempt in (
        "first",
        "second",
    ):  # the first compiles; the second takes as long as all others
        shutil.rmtree(whole.parent, ignore_errors=True)
        prepare(whole)
        started = time.perf_counter()
        status, lines = laboratory.run(arguments(whole), whole)
        seconds = time.perf_counter() - started
        if status:
            raise RuntimeError(f"{name}, {attempt} run left alone: status {status}: {lines[-2:]}")
    outcome.seconds = seconds
    events = int(lines[-1].removeprefix("events: "))
    expected = outcome_of(whole)
    before = outcome_of(folder / "fitted") if name == "evaluate" else {}
    while outcome.kills.total() < kills:
        run = folder / name / str(outcome.runs) / "run"
        prepare(run)
        for _ in range(min(rng.randint(1, MOST), kills - outcome.kills.total())):
            inside = rng.random() < 0.5
            when = (
                {"at": rng.randint(1, events)} if inside else {"after": rng.uniform(0.1, seconds)}
            )
            status, lines = laboratory.run(arguments(run), run, **when)
            if status == -signal.SIGKILL:
                outcome.kills[_place(lines) if inside else "at a time"] += 1
            elif status:
                outcome.failures.append(f"{outcome.runs}: status {status}: {lines[-2:]}")
            if run.exists():
                outcome.torn += [f"{outcome.runs}: {each}" for each in check_whole(run)]
            if name == "evaluate":
                for file, bits in outcome_of(run).items():
                    temporary = Path(file).name.startswith(".")
                    if not temporary and bits not in (before.get(file), expected.get(file)):
                        outcome.torn.append(f"{outcome.runs}: {file} is neither old nor new")
        status, lines = laboratory.run(arguments(run), run)
        if status:
            outcome.failures.append(f"{outcome.runs}, to its end: status {status}: {lines[-2:]}")
            outcome.runs += 1
            continue
        found = outcome_of(run)
        different = [key for key in expected | found if expected.get(key) != found.get(key)]
        outcome.differences += [f"{outcome.runs}: {key}" for key in different]
        if not different:
            shutil.rmtree(run.parent)
        outcome.runs += 1
        print(f"{name}: {outcome.kills.total()} of {kills} kills, {len(different)} differences")
    return outcome


def _place(lines: list[str]) -> str:
    """Where a process killed itself: the event, and the kind of file."""
    event, _, name = lines[-1].partition(" ")
    parts = Path(name).parts
    kind = "the run" if not parts else parts[0]
    if kind.startswith("."):
        kind = kind[1:].rpartition(".")[0]
    return f"{event.removeprefix('os.')} {kind}"


def main() -> None:
    """Run what is asked for and write its figures."""
    commands = ("fit", "sample", "evaluate")
    parser = argparse.ArgumentParser(description="kill probattn anywhere, and go on")
    parser.add_argument("--kills", type=int, default=200, help="of all commands, shared evenly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=commands, default=list(commands))
    parser.add_argument("--folder", type=Path, help="keeps what differs; by default a new one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    laboratory = Laboratory(folder, options.seed)
    path = options.out / "faults.json"
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in options.only:
        started = time.perf_counter()
        outcome = faults(laboratory, name, -(-options.kills // len(options.only)))
        found = {
            "torn": outcome.torn,
            "differences": outcome.differences,
            "failures": outcome.failures,
        }
        results[name] = {
            "kills": outcome.kills.total(),
            "found": sum(map(len, found.values())),
            "runs": outcome.runs,
            "seconds_left_alone": round(outcome.seconds, 2),
            **found,
            "killed_at": dict(sorted(outcome.kills.items())),
            "seed": options.seed,
            "seconds": round(time.perf_counter() - started),
            "environment": environment(),
        }
        # Those of the other commands stay.
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(kept | {name: results[name]}, indent=2) + "\n", encoding="utf-8")
    for name in options.only:
        row = results[name]
        counts = ", ".join(f"{len(row[key])} {key}" for key in ("torn", "differences", "failures"))
        print(f"{name:9s} {row['kills']:4d} kills of {row['runs']:4d} runs: {counts}")
        for each in itertools.chain(row["torn"], row["differences"], row["failures"]):
            print(" ", each)
    print("wrote", path)
    found_any = any(row["found"] for row in results.values())
    if not found_any and options.folder is None:
        shutil.rmtree(folder)
    sys.exit(found_any)


if __name__ == "__main__":
    main()
