"""Run the paper's experiments and the table of methods; go on where it was interrupted.

    python examples/reproduce/run.py --text valid.txt --test test.txt --runs runs/reproduce

fits every method at every value of its setting, tunes it, repeats it with several seeds, measures
all under noise, and writes tables, figures and `table.md`. `--only paper` does the paper's two runs
alone (its Figs 7.4 and 7.5). See README.md beside this file.
"""

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import figures
from collect import write_results
from measure import is_done, work
from plan import (
    METHODS,
    PARTS,
    TUNING_SEEDS,
    Scale,
    Task,
    choose_data,
    every_task,
    first_tasks,
    read_methods,
    read_scale,
    tuned_tasks,
)
from summary import read_results, tuned_settings

from probattn.inference.config_files import format_config
from probattn.inference.runtime.task_processes import exit_status, run_apart, run_here
from probattn.text.corpora import NAMED_SOURCES, Corpus, DataConfig

_NAME = "run.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; the exit status is 0 only when all of it is done."""
    return exit_status(_NAME, partial(_run, _parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the paper's experiments and the table of methods")
    parser.add_argument("--runs", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--text", help="UTF-8 text to fit; by default WikiText-2, else pydoc")
    parser.add_argument("--test", help="UTF-8 text to evaluate on; by default the end of the text")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scale", default="small", help="small, paper, or a TOML file")
    parser.add_argument("--methods", type=Path, default=METHODS, help="TOML file of the methods")
    parser.add_argument("--seeds", type=int, default=5, help="of every tuned setting (default 5)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core for each")
    parser.add_argument("--out", type=Path, help="tables and figures (default: RUNS/results)")
    return parser


def _run(options: argparse.Namespace) -> int:
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: got {getattr(options, name)}, expected an integer >= 1")
    if options.test and not options.text:
        raise ValueError("--test: got a text to evaluate on without --text, the one to fit")
    scale = read_scale(options.scale)
    data, corpus = choose_data(options.text, options.test)
    out = options.out or options.runs / "results"
    methods, place = read_methods(options.methods), (scale, data, options.runs)
    common = (methods, options.seeds, *place)

    setting = _setting(options, scale, data, corpus)
    # Tables are of all runs of these methods in the folder, whatever part is asked for now.
    every = every_task(methods, _seeds(options), *place)
    try:
        failed = _do(first_tasks(options.only, *common), options.jobs)
        if {"methods", "kinds"} & set(options.only):
            write_results(every, corpus, setting, out)
            seeds = range(min(options.seeds, TUNING_SEEDS))
            chosen = tuned_settings(read_results(out).noise, seeds)
            failed += _do(tuned_tasks(chosen, options.only, *common), options.jobs)
    finally:  # an interrupted command leaves what it has
        write_results(every, corpus, setting, out)
    for path in figures.draw(out):
        print(path)
    if failed:
        print(f"{failed} of the runs failed and are missing from the tables", file=sys.stderr)
    return 1 if failed else 0


def _seeds(options: argparse.Namespace) -> list[int]:
    """Return the seeds asked for now, and those asked for before."""
    found = (path.name.removeprefix("seed-") for path in options.runs.glob("*/*/seed-*"))
    return sorted({*range(options.seeds), *(int(name) for name in found if name.isdecimal())})


def _do(tasks: Sequence[Task], jobs: int) -> int:
    """Run what is not done yet, with a line for each; returns how many failed."""
    left = [task for task in tasks if not is_done(task)]
    print(f"{len(tasks)} runs, {len(tasks) - len(left)} of them done before", flush=True)
    started, failures = time.monotonic(), 0
    apart = jobs > 1
    made = run_apart(left, work, jobs=jobs, command=_NAME) if apart else run_here(left, work)
    for number, (task, seconds, failed) in enumerate(made, start=1):
        per_run = (time.monotonic() - started) / number
        rest = f"{per_run * (len(left) - number) / 60:.0f} min left"
        failures += bool(failed)
        print(
            f"[{number}/{len(left)}] {task.title}: {failed or f'{seconds:.0f} s'}; {rest}",
            flush=True,
        )
    return failures


def _setting(options: argparse.Namespace, scale: Scale, data: DataConfig, corpus: Corpus) -> str:
    """Describe what all runs have in common, for the table's reader."""
    text = corpus.description if data.source in NAMED_SOURCES else corpus.name
    if options.text is None and data.source != "wikitext-2":
        text += ", as WikiText-2 could not be downloaded"
    if data.validation:
        text += f", evaluated on {Path(data.validation).name}"
    versions = ", ".join(f"{each} {version(each)}" for each in ("jax", "numpyro", "optax"))
    return (
        f"Text: {text}; {len(corpus.train):,} characters to fit, "
        f"{len(corpus.validation):,} to evaluate on; checksum {corpus.sha256[:12]}.\n"
        f"Scale {Path(options.scale).stem}, Python {platform.python_version()}, {versions}.\n\n"
        f"{format_config(scale)}"
    )


if __name__ == "__main__":
    sys.exit(main())
