"""Does the margin of a token foretell loops and rising loss? See README.md.

    python examples/decoding/decoding.py --run runs/smollm2 --text valid.txt --out runs/decoding

goes on where it was interrupted, and ends with the tables and the figure that `decoding_report.py`
makes of the two files of tokens.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from decoding_questions import (
    AHEAD,
    COPIES,
    COUNTED,
    FIRST,
    GRAM,
    NEW,
    PROMPT,
    TEMPERATURES,
    WINDOW,
    Scale,
)
from decoding_tokens import Found, measure
from sequences import continuations, read_articles

from probattn.inference import ImportedRun, load_run
from probattn.inference.evaluation.texts import check_seed
from probattn.inference.runs.csv_tables import write_packed
from probattn.inference.runs.files import check_setting, replacing
from probattn.inference.runs.npz import read_part
from probattn.inference.runtime.progress import progress_bar
from probattn.inference.runtime.task_processes import exit_status
from probattn.text.corpora import open_text
from probattn.text.pieces import checksum

_DIGITS = 3  # of numbers in the tables, of which ranks are taken
_TEXT = "text"  # the pass over real text; others are named after their temperature


@dataclass(frozen=True)
class Study:
    """What is measured, and where it is kept.

    Attributes:
        run: the model.
        articles: beginnings of articles, (A, WINDOW).
        scale: how much is measured.
        seed: of the draws.
        parts: folder of what is measured.
    """

    run: ImportedRun
    articles: np.ndarray
    scale: Scale
    seed: int
    parts: Path

    def chunks(self) -> list[np.ndarray]:
        """Return the numbers of the articles that are measured together."""
        numbers, size = np.arange(len(self.articles)), self.scale.together
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def path(self, name: str, chunk: int) -> Path:
        """Return the file of a part."""
        return self.parts / f"{name}-{chunk:03d}.npz"

    def finished(self) -> list[int]:
        """Return the numbers of the chunks that are measured, all passes of them."""
        every = range(len(self.chunks()))
        return [n for n in every if all(self.path(name, n).exists() for name in _names())]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names."""
    return exit_status("decoding.py", partial(_run, _parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="does a margin foretell loops and rising loss?")
    parser.add_argument("--run", required=True, type=Path, help="run of `probattn import`")
    parser.add_argument("--text", required=True, type=Path, help="text of WikiText, as published")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--articles", type=int, default=Scale.articles)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", type=Path, help="folder of what is measured (OUT/parts)")
    return parser


def _run(options: argparse.Namespace) -> None:
    run = load_run(options.run)
    if not isinstance(run, ImportedRun):
        raise ValueError(
            f"--run: {options.run} is no imported model: expected one, make it with "
            "`probattn import`"
        )
    if run.network.prefix:
        raise ValueError(
            f"--run: {options.run} reads {' '.join(run.vocabulary.display(run.network.prefix))} "
            "before each text, which this study does not: expected a model that begins with a text"
        )
    if options.articles < 2:
        raise ValueError(f"--articles: got {options.articles}, expected an integer >= 2")
    check_seed(options.seed)
    scale = replace(Scale(), articles=options.articles)
    study = Study(
        run,
        read_articles(run, options.text, scale.articles),
        scale,
        options.seed,
        options.parts or options.out / "parts",
    )
    text = f"{options.text.name} {checksum([open_text(options.text)])[:12]}"
    _check_folder(study, text)
    try:
        make_parts(study, progress=True)
    finally:  # an interrupted study leaves the articles that it has finished
        if study.finished():
            for path in write_tokens(study, options.out):
                print(path)
    from decoding_report import summarise  # which loads Matplotlib

    for path in summarise(options.out):
        print(path)


def _check_folder(study: Study, text: str) -> None:
    """Make the folder of a study's parts, or check that those in it are of this study.

    Raises:
        RunError: if they are of another one.
    """
    wanted = {
        "model": study.run.checksum[:12],
        "text": text,
        "seed": str(study.seed),
        "settings": f"{AHEAD} {GRAM} {COPIES} {PROMPT} {NEW} {WINDOW} {TEMPERATURES}",
        **{name: str(value) for name, value in asdict(study.scale).items()},
    }
    check_setting(study.parts / "setting.json", wanted)


def make_parts(study: Study, *, progress: bool) -> None:
    """Measure what is not measured yet, chunk by chunk, each kept as soon as it is there."""
    every = [(name, chunk) for chunk in range(len(study.chunks())) for name in _names()]
    todo = [each for each in every if not study.path(*each).exists()]
    with progress_bar(
        "decoding",
        total=len(every),
        initial=len(every) - len(todo),
        unit="part",
        visible=progress,
    ) as bar:
        for name, chunk in todo:
            bar.show(now=name)
            tokens = _sequences(study, name, chunk)
            found = measure(study.run, tokens)
            with replacing(study.path(name, chunk)) as file:
                np.savez_compressed(file, tokens=tokens, **found)
            bar.update(1)


def _names() -> list[str]:
    return [*map(str, TEMPERATURES), _TEXT]


def _sequences(study: Study, name: str, chunk: int) -> np.ndarray:
    numbers = study.chunks()[chunk]
    articles = study.articles[numbers]
    if name == _TEXT:
        return articles
    return continuations(
        study.run, articles[:, :PROMPT], numbers, temperature=float(name), seed=study.seed
    )


def write_tokens(study: Study, out: Path) -> Iterator[Path]:
    """Write what is known of every token: of continuations up to the last that counts, of text.

    They are the tokens of the articles that are measured.
    """
    generated = [_table(study, str(each), COUNTED, temperature=each) for each in TEMPERATURES]
    joined = {name: np.concatenate([each[name] for each in generated]) for name in generated[0]}
    yield write_packed(out / "generated.csv.gz", joined, digits=_DIGITS)
    text = _table(study, _TEXT, WINDOW)
    del text["loop"]
    yield write_packed(out / "text.csv.gz", text, digits=_DIGITS)


def _table(study: Study, name: str, end: int, **constants: float) -> Found:
    chunks = study.finished()
    parts = [read_part(study.path(name, chunk)) for chunk in chunks]
    numbers = np.concatenate([study.chunks()[chunk] for chunk in chunks])
    columns = {each: np.concatenate([part[each] for part in parts]) for each in parts[0]}
    # The first holds the text, and the second is the least of others.
    del columns["tokens"], columns["margin_worst"]
    shape = next(iter(columns.values())).shape
    places = {
        "article": np.broadcast_to(numbers[:, None], shape),
        **{each: np.full(shape, value) for each, value in constants.items()},
        "position": np.broadcast_to(np.arange(shape[1]), shape),
    }
    return {each: values[:, FIRST:end].ravel() for each, values in (places | columns).items()}


if __name__ == "__main__":
    sys.exit(main())
