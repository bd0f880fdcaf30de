"""What all runs have found, as tables: one row per run, report, and point of noise."""

from collections.abc import Sequence
from pathlib import Path

from measure import compared, is_fitted, measured
from plan import Task

from probattn.inference import load_run
from probattn.inference.runs.checks import check_same_corpus
from probattn.inference.runs.csv_tables import write_table
from probattn.inference.runs.files import write_text
from probattn.text.corpora import Corpus

RUN = ("method", "setting", "seed")
FINISHED = ("validation_bpc", "best_step", "steps", "parameters", "rejected_steps")
REPORTED = (
    "bpc",
    "validation_bpc",
    "embedding_rms",
    "mean_margin",
    "min_margin",
    "min_margin_kind",
    "mean_log_det",
    "infeasible_fraction",
    "coupling_eigenvalue_min",
    "coupling_eigenvalue_max",
)
NOISE = ("half", "kind", "unit", "level", "bpc", "degradation")


def write_results(tasks: Sequence[Task], corpus: Corpus, setting: str, out: Path) -> list[Path]:
    """Write what is found in the runs of tasks that are finished.

    runs.csv, curves.csv, noise.csv and setting.txt; and where margins and losses were compared,
    sensitivity_margins.csv, sensitivity_comparisons.csv and support_tokens.csv.

    Args:
        tasks: a task for each run that there may be.
        corpus: text that they were fitted on.
        setting: what they have in common, for the reader.
        out: folder of the tables.

    Raises:
        RunError: if a run has another configuration than its task, or another corpus.
    """
    runs, curves, noise = [], [], []
    tables: dict[str, list[dict]] = {}
    for task in tasks:
        if not is_fitted(task):
            continue
        run = load_run(task.out)
        check_same_corpus(run, corpus)
        name = (task.setting.method, task.setting.name, task.seed)
        summary, rows = run.summary(), run.metrics()
        seconds = summary.get("reproduce", {}).get("seconds")
        of_fit = [summary["fit"][key] for key in FINISHED]
        runs.append((*name, *of_fit, rows[-1]["bpc"], rows[-1]["embedding_rms"], seconds))
        fit, block = run.config.fit, run.config.model.block
        epoch = fit.batch * block / len(corpus.train)
        curves += [
            (*name, row["step"], row["step"] * epoch, *(row.get(key) for key in REPORTED))
            for row in rows
        ]
        noise += [(*name, *(point[key] for key in NOISE)) for point in measured(task, run)]
        for table, found in compared(task, run).items():
            of_run = dict(zip(RUN, name, strict=True))
            tables.setdefault(table, []).extend(of_run | row for row in found)
    last = ("train_bpc", "embedding_rms", "seconds")
    written = [
        write_table(out / "runs.csv", (*RUN, *FINISHED, *last), sorted(runs)),
        write_table(out / "curves.csv", (*RUN, "step", "epoch", *REPORTED), _sorted(curves, 4)),
        write_table(out / "noise.csv", (*RUN, *NOISE), _sorted(noise, 7)),
    ]
    written += [
        write_table(
            out / f"{table}.csv", list(rows[0]), _sorted([tuple(row.values()) for row in rows], 3)
        )
        for table, rows in tables.items()
        if rows
    ]
    write_text(out / "setting.txt", setting)
    return [*written, out / "setting.txt"]


def _sorted(rows: list[tuple], columns: int) -> list[tuple]:
    """Sort by the columns that name a row: others may be missing, which has no order."""
    return sorted(rows, key=lambda row: row[:columns])
