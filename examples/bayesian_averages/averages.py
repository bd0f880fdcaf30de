"""What is a Bayesian average good for? Methods at equal gradients, on text that is held out.

    python examples/bayesian_averages/averages.py small
    python examples/bayesian_averages/averages.py tinyshakespeare --text input.txt

fits and samples a model by every method of methods.toml, with several seeds, and measures what the
averages predict. Each run is a process of its own, one after the other, so that its time and memory
are its own. The same command goes on where it was interrupted. Leaves tables and a figure in --out;
`averages_report.py FOLDER` makes them again from the CSV files alone.
"""

import argparse
import dataclasses
import platform
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from averages_plan import SCALES, Scale, Task, tasks
from one_average import MARGIN_LEVELS, measured, work

from probattn.inference.config_files import format_config
from probattn.inference.runs.csv_tables import write_table
from probattn.inference.runs.files import write_text
from probattn.inference.runtime.task_processes import exit_status, run_apart

_NAME = "averages.py"
RUN = ("objective", "method", "seed")
NUMBERS = (
    *("gradients", "members", "bpc", "accuracy", "calibration_error", "area", "noise"),
    *("divergences", "cpu_seconds", "wall_seconds", "memory_mib", "load"),
)
STAGES = ("first_layer_margin", "trained_margin")
COVERAGE = ("coverage", "coverage_bpc", "coverage_accuracy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; the exit status is 0 only when all of it is done."""
    return exit_status(_NAME, partial(_run, _parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Bayesian averages at equal gradients")
    parser.add_argument("scale", choices=list(SCALES))
    parser.add_argument("--out", type=Path, default=Path("runs/bayesian_averages"))
    parser.add_argument("--text", help="UTF-8 text of the scale tinyshakespeare")
    parser.add_argument("--only", nargs="+", help="methods (default: all of the scale)")
    names = ("ce", "margin", "full")
    parser.add_argument("--objectives", nargs="+", choices=names, help="(default: all)")
    parser.add_argument("--gradients", type=int, help="of a minibatch, for every method")
    parser.add_argument("--seeds", type=int, help="how often everything is done")
    return parser


def _run(options: argparse.Namespace) -> int:
    scale = SCALES[options.scale]
    given = {name: getattr(options, name) for name in ("gradients", "seeds")}
    scale = dataclasses.replace(scale, **{n: value for n, value in given.items() if value})
    out = options.out / options.scale
    every = list(tasks(scale, text=options.text, out=out))
    wanted = [
        task
        for task in tasks(scale, text=options.text, out=out, only=options.only)
        if options.objectives is None or task.config.objective.name in options.objectives
    ]
    try:
        failed = _make(wanted)
    finally:  # an interrupted command leaves what it has
        write_results(every, scale, out)
    # Not above: the processes of the runs import this file, and need no Matplotlib.
    from averages_report import write_report

    for path in write_report(options.out):
        print("wrote", path)
    return 1 if failed else 0


def _make(wanted: Sequence[Task]) -> int:
    """Make what is not there yet, with a line for each; returns how many failed."""
    left, failures = [task for task in wanted if measured(task) is None], 0
    print(f"{len(wanted)} runs, {len(wanted) - len(left)} of them done before", flush=True)
    made = run_apart(left, work, jobs=1, command=_NAME)
    for number, (task, seconds, failed) in enumerate(made, start=1):
        failures += bool(failed)
        found = measured(task) or {}
        said = failed or f"{found['bpc']:.4f} bits per character, {seconds:.0f} s"
        print(f"[{number}/{len(left)}] {task.title}: {said}", flush=True)
    return failures


def write_results(every: Sequence[Task], scale: Scale, out: Path) -> None:
    """Write what is measured: runs.csv and coverage.csv, and setting.txt for the reader."""
    runs, coverage = [], []
    for task in every:
        if (found := measured(task)) is None:
            continue
        name = (task.config.objective.name, task.method.name, task.seed)
        first, trained = (found.get(stage, [None] * len(MARGIN_LEVELS)) for stage in STAGES)
        runs.append((*name, *(found[each] for each in NUMBERS), *first, *trained))
        columns = zip(*(found[each] for each in COVERAGE), strict=True)
        coverage += [(*name, *row) for row in columns]
    of_stages = [f"{stage}_{100 * level:.0f}" for stage in STAGES for level in MARGIN_LEVELS]
    write_table(out / "runs.csv", (*RUN, *NUMBERS, *of_stages), runs)
    write_table(out / "coverage.csv", (*RUN, *COVERAGE), coverage)
    config = every[0].config
    named = dataclasses.replace(config.data, source=Path(str(config.data.source)).name)
    versions = ", ".join(f"{each} {version(each)}" for each in ("jax", "numpyro", "blackjax"))
    write_text(
        out / "setting.txt",
        f"{scale.gradients} gradients of {config.fit.batch} x {config.model.block} tokens; "
        f"{scale.margin_sequences} sequences for margins. Objective, guide, seed: see a row.\n"
        f"Python {platform.python_version()}, {versions}.\n\n"
        f"{format_config(dataclasses.replace(config, data=named))}",
    )


if __name__ == "__main__":
    sys.exit(main())
