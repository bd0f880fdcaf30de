"""Fine-tune a published model with and without the barrier, and measure both; see README.md.

    python examples/fine_tuning/fine_tune.py --base runs/smollm2 --text input.txt --other valid.txt

Each fit is a process of its own, one after the other. The same command goes on where it was
interrupted, within a fit too. Leaves runs.csv, a table and a figure in --out;
`tuning_report.py FOLDER` makes the last two again from runs.csv alone.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from one_tuning import measured, work
from tuning_plan import NOISE, PUBLISHED, Sizes, Task, tasks

from probattn.inference.runs.csv_tables import write_table
from probattn.inference.runs.files import write_text
from probattn.inference.runtime.task_processes import exit_status, run_apart

_NAME = "fine_tune.py"
COLUMNS = (
    *("bpc", *(f"noise_{level:g}" for level in NOISE), "rounded", "other"),
    *("smallest", "median", "folded", "fit_seconds", "seconds"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; the exit status is 0 only when all of it is done."""
    return exit_status(_NAME, partial(_run, _parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="fine-tuning with and without the barrier")
    parser.add_argument("--base", required=True, type=Path, help="run of `probattn import`")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text to fit")
    parser.add_argument("--other", required=True, type=Path, help="UTF-8 text of another kind")
    parser.add_argument("--out", type=Path, default=Path("runs/fine_tuning"))
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    return parser


def _run(options: argparse.Namespace) -> int:
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)}
    sizes = _checked(Sizes(**given))
    every = list(tasks(options.base, options.text, options.other, sizes, options.out))
    try:
        failed = _make(every)
    finally:  # an interrupted command leaves what it has
        write_results(every, options.out)
    if failed:
        return 1
    # Not above: the processes of the fits import this file, and need no Matplotlib.
    from tuning_report import write_report

    for path in write_report(options.out):
        print("wrote", path)
    return 0


def _checked(sizes: Sizes) -> Sizes:
    for name, value in dataclasses.asdict(sizes).items():
        if value < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: got {value}, expected an integer >= 1")
    return sizes


def _make(every: Sequence[Task]) -> int:
    """Make what is not there yet, with a line for each; returns how many failed."""
    left, failures = [task for task in every if measured(task) is None], 0
    print(f"{len(every)} models, {len(every) - len(left)} of them done before", flush=True)
    made = run_apart(left, work, jobs=1, command=_NAME)
    for number, (task, seconds, failed) in enumerate(made, start=1):
        failures += bool(failed)
        found = measured(task) or {}
        said = failed or f"{found['bpc']:.4f} bits per character, {seconds:.0f} s"
        print(f"[{number}/{len(left)}] {task.title}: {said}", flush=True)
    return failures


def write_results(every: Sequence[Task], out: Path) -> None:
    """Write what is measured: runs.csv, and setting.txt for the reader."""
    rows = []
    for task in every:
        if (found := measured(task)) is not None:
            seed = "" if task.setting == PUBLISHED else task.seed
            rows.append((task.setting, seed, *(found[each] for each in COLUMNS)))
    write_table(out / "runs.csv", ("setting", "seed", *COLUMNS), rows)
    names = ("model", "text", "other text")
    said = {name: each[:12] for name, each in zip(names, every[0].checksums, strict=True)}
    said |= dataclasses.asdict(every[0].sizes)
    write_text(out / "setting.txt", "".join(f"{name}: {n}\n" for name, n in said.items()))


if __name__ == "__main__":
    sys.exit(main())
