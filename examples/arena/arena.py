"""Train every contender, and ask which of them is stable; go on where it was interrupted.

    python examples/arena/arena.py --text valid.txt --test test.txt --runs runs/arena --jobs 2

See README.md beside this file for the questions and the rules.
"""

import argparse
import platform
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from arena_measure import Job, is_done, work
from arena_plan import Scale, read_common, read_methods, read_scale
from arena_results import write_results

from probattn.inference.config_files import format_config
from probattn.inference.runs.files import write_text
from probattn.inference.runtime.progress import progress_bar
from probattn.inference.runtime.task_processes import exit_status, run_apart, run_here
from probattn.text.corpora import DataConfig, load_corpus

_NAME = "arena.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; the exit status is 0 only when all of it is done."""
    return exit_status(_NAME, partial(_run, _parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="an arena for training")
    parser.add_argument("--text", required=True, help="UTF-8 text to fit")
    parser.add_argument("--test", required=True, help="UTF-8 text to tune and to evaluate on")
    parser.add_argument("--runs", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--scale", default="small", help="small, quick, large, or a TOML file")
    parser.add_argument("--only", nargs="+", help="methods (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core for each")
    parser.add_argument("--out", type=Path, help="tables and figures (default: RUNS/results)")
    return parser


def _out(options: argparse.Namespace) -> Path:
    return options.out or options.runs / "results"


def _run(options: argparse.Namespace) -> int:
    if options.jobs < 1:
        raise ValueError(f"--jobs: got {options.jobs}, expected an integer >= 1")
    scale, data = read_scale(options.scale), DataConfig(options.text, options.test)
    every, methods = read_methods(scale), read_methods(scale, options.only)
    setting = _setting(scale, data)
    _check_folder(options.runs, {"setting.txt": setting, "common.txt": read_common()})
    jobs = [
        Job(method, settings, scale, data, options.runs) for method, settings in methods.items()
    ]
    try:
        failed = _do(jobs, options.jobs)
    finally:  # an interrupted command leaves what it has
        write_results(every, scale, options.runs, _out(options))
        write_text(_out(options) / "setting.txt", setting)
    # Not above: the processes of the runs import this file, and need no Matplotlib.
    from arena_report import write_report

    for path in write_report(_out(options)):
        print(path)
    return 1 if failed else 0


def _do(jobs: Sequence[Job], at_once: int) -> int:
    """Make what is not there yet; returns how many methods failed."""
    left, failures = [job for job in jobs if not is_done(job)], 0
    done = len(jobs) - len(left)
    with progress_bar("arena", total=len(jobs), initial=done, unit="method") as bar:
        apart = at_once > 1
        made = run_apart(left, work, jobs=at_once, command=_NAME) if apart else run_here(left, work)
        for job, seconds, failed in made:
            failures += bool(failed)
            bar.update(1)
            bar.line(f"{job.method}: {failed or f'{seconds:.0f} s'}")
    return failures


def _setting(scale: Scale, data: DataConfig) -> str:
    """Describe what all runs have in common, for the reader."""
    corpus = load_corpus(data)
    versions = ", ".join(f"{each} {version(each)}" for each in ("jax", "numpyro", "optax"))
    return (
        f"Text: {Path(data.source).name}, {len(corpus.train):,} characters to fit; "
        f"{Path(data.validation).name}, {len(corpus.validation):,} to evaluate on; checksum "
        f"{corpus.sha256[:12]}.\nPython {platform.python_version()}, {versions}.\n\n"
        f"{format_config(scale)}"
    )


def _check_folder(folder: Path, common: dict[str, str]) -> None:
    """Refuse a folder of runs that have something else in common than these files say."""
    for name, said in common.items():
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8") != said:
            raise ValueError(
                f"{folder}: holds runs of another scale, text or version, or of methods that set "
                f"something else: expected those of {name}; name another folder"
            )
    for name, said in common.items():
        write_text(folder / name, said)


if __name__ == "__main__":
    sys.exit(main())
