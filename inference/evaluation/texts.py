"""The text that an evaluation takes: the run's validation text, or a file."""

import os
from pathlib import Path

import numpy as np

from probattn.inference.runs.checks import check_same_corpus
from probattn.inference.runs.run import Run, require_fit
from probattn.text.corpora import load_corpus, read_text


def check_seed(seed: int) -> None:
    """Refuse a seed that makes no random key.

    Raises:
        ValueError: if it is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}, expected an integer from 0 to 2^32 - 1")


def text_tokens(run: Run, text: str | os.PathLike[str] | None) -> tuple[np.ndarray, str]:
    """Return the tokens of a file, or of the run's validation text, and what to call it.

    Raises:
        ValueError: if the run is a sampled posterior (RunError), or the text cannot be read, is
            shorter than two tokens or has a character that the vocabulary lacks.
    """
    run = require_fit(run)
    if text is None:
        corpus = load_corpus(run.config.data)
        check_same_corpus(run, corpus)
        content, name = corpus.validation, f"validation text of {corpus.name}"
    else:
        content, name = read_text(text), Path(text).name
    try:
        tokens = run.vocabulary.encode(content)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if len(tokens) < 2:
        raise ValueError(f"{name}: has {len(tokens)} tokens: expected at least 2")
    return tokens, name
