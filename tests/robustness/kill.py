"""Kill commands of `probattn` anywhere, go on, and compare with those left alone.

    python -m tests.robustness.kill [--kills 200] [--seed 0] [--only fit sample evaluate ...]

Half of the kills come at a random moment. The others come from within: the process kills itself
when it opens, renames, removes or syncs the n-th file of its run, n random; at a sync it first cuts
off a random part of what was not synced before, as a machine that dies may. Every run is killed up
to three times before it may end. After each kill every file must be whole. In the end parameters,
optimizer state, draws and metrics must be those of the run left alone, to the last bit, and nothing
else may lie there; only times of day and durations differ. Commands that write beside a run begin
anew after a kill. Their temporary files stay, since nothing tells whose they are.
"""

import argparse
import itertools
import json
import math
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import environment
from tests.robustness.killing.laboratory import Laboratory
from tests.robustness.killing.outcomes import outcome_of_files, outcome_of_fit, outcome_of_sample
from tests.robustness.killing.whole import check_whole
from tests.support.project import ROOT

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
# Commands that take a fitted run, and their further options.
READING = {
    "evaluate": ["--noise-absolute", "0.5", "--noise-relative", "1"],
    "margins": [],
    "sensitivity": ["--draws", "2"],
    "generate": ["--prompt", "the", "--length", "20"],
    "compare": [],
}
COMMANDS = ("fit", "sample", *READING)
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
        begin, outcome_of = [name], outcome_of_files
        if not (folder / "fitted").exists():
            fitted = ["fit", "--data", source, *MODEL, *FIT, "--out", str(folder / "fitted")]
            status, lines = laboratory.run(fitted, folder)
            if status:
                raise RuntimeError(f"fit of the run for {name}: status {status}: {lines[-1]}")

    def arguments(run: Path) -> list[str]:
        if name == "evaluate":
            return ["evaluate", str(run), *READING[name]]
        if name in READING:
            out = run / "text.csv" if name == "generate" else run
            return [name, str(folder / "fitted"), *READING[name], "--out", str(out)]
        if (run / "config.toml").exists():
            return [name, "--out", str(run), "--resume"]
        return [*begin, "--out", str(run)]

    def prepare(run: Path) -> None:
        run.parent.mkdir(parents=True)
        if name == "evaluate":
            shutil.copytree(folder / "fitted", run)

    # The first compiles; the second takes as long as all others.
    for attempt in ("first", "second"):
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
            if name in READING and run.exists():
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
        if name in READING and name != "evaluate":
            found = {file: bits for file, bits in found.items() if Path(file).name[0] != "."}
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
    parser = argparse.ArgumentParser(description="kill probattn anywhere, and go on")
    parser.add_argument("--kills", type=int, default=200, help="of all commands, shared evenly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--folder", type=Path, help="keeps what differs; by default a new one")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
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
        print(f"{name:11s} {row['kills']:4d} kills of {row['runs']:4d} runs: {counts}")
        for each in itertools.chain(row["torn"], row["differences"], row["failures"]):
            print(" ", each)
    print("wrote", path)
    found_any = any(row["found"] for row in results.values())
    if not found_any and options.folder is None:
        shutil.rmtree(folder)
    sys.exit(found_any)


if __name__ == "__main__":
    main()
