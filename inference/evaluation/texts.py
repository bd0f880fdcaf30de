"""The text that an evaluation takes: the run's validation text, or a file."""

import os
from pathlib import Path

import numpy as np

from probattn.inference.runs.checks import check_same_corpus
from probattn.inference.runs.run import FittedRun, require_fitted
from probattn.text.corpora import load_corpus, open_text
from probattn.text.pieces import checksum
from probattn.text.tokens import corpus_tokens, token_arrays


def check_seed(seed: int) -> None:
    """Refuse a seed that makes no random key.

    Raises:
        ValueError: if it is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}, expected an integer from 0 to 2^32 - 1")


def text_tokens(run: FittedRun, text: str | os.PathLike[str] | None) -> tuple[np.ndarray, str]:
    """Return the tokens of a file, or of the run's validation text, and what to call it.

    Raises:
        ValueError: if the run is a sampled posterior (RunError), or the text cannot be read, is
            shorter than two tokens or has a character that the vocabulary lacks.
    """
    run = require_fitted(run)
    if text is None:
        corpus = load_corpus(run.config.data)
        check_same_corpus(run, corpus)
        _, tokens = corpus_tokens(corpus, run.vocabulary)
        name = f"validation text of {corpus.name}"
    else:
        tokens, name = _of_file(run, text), Path(text).name
    if len(tokens) < 2:
        raise ValueError(f"{name}: has {len(tokens)} tokens: expected at least 2")
    return tokens, name


def _of_file(run: FittedRun, path: str | os.PathLike[str]) -> np.ndarray:
    text = open_text(path)
    try:
        [tokens] = token_arrays(run.vocabulary, [text], checksum([text]))
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from None
    return tokens
