"""The embeddings that are observed: simulated with a known coupling, or those of a fitted network.

Whatever their origin, they are sequences (N, T, d) in units of their root mean square, and as many
held-out sequences from another part of the text.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, substitute, trace

from probattn.inference import FitConfig, RunConfig, fit
from probattn.inference.runs.run import load_fitted
from probattn.models import (
    LanguageModelConfig,
    LatentEmbeddingsConfig,
    ObjectiveConfig,
    observed_embeddings,
)
from probattn.text.batches import windows
from probattn.text.corpora import DataConfig, load_corpus
from probattn.text.displayed import DisplayedTokens
from probattn.text.tokens import corpus_tokens

NETWORK_WIDTH = 16  # of the character models that are fitted here
_SIMULATION_SEED = 7


@dataclass(frozen=True)
class Observed:
    """Embeddings of one data set.

    Attributes:
        name: the data set.
        train: sequences (N, T, d) that the posterior is given.
        held_out: sequences (N, T, d) that are predicted.
        note: what they are, for the reader of a table.
        truth: values of the sample sites that made them, None if nobody knows them.
        shown: the tokens of the training sequences as they are shown, (N, T); None if there are
            none.
    """

    name: str
    train: np.ndarray
    held_out: np.ndarray
    note: str
    truth: dict[str, np.ndarray] | None = None
    shown: np.ndarray | None = None


def model_of(observed: Observed, coupling: str) -> partial:
    """Return the model of the embeddings: A of full rank d, and sigma.

    A bounded context has c = sqrt(d), the length of an embedding in the root mean square.
    """
    sequences, length, width = observed.train.shape
    return partial(observed_embeddings, config=_config(width, sequences, length, coupling=coupling))


def simulated(width: int, sequences: int, length: int) -> Observed:
    """Draw A from its prior, bounded, and twice as many sequences with sigma = 1."""
    model = partial(observed_embeddings, config=_config(width, 2 * sequences, length))
    known = substitute(model, {"scale": jnp.ones(())})

    @jax.jit
    def drawn(key):
        sites = trace(seed(known, key)).get_trace()
        return {name: site["value"] for name, site in sites.items() if site["type"] == "sample"}

    with jax.enable_x64(True):
        truth = {n: np.asarray(v) for n, v in drawn(jax.random.key(_SIMULATION_SEED)).items()}
    x = truth.pop("embeddings")
    note = "a draw from the model itself, with sigma = 1 and A from its prior"
    return Observed("simulated", x[:sequences], x[sequences:], note, truth)


def of_text(
    name: str, data: DataConfig, width: int, sequences: int, length: int, *, steps: int, out: Path
) -> Observed:
    """Fit a small character model by cross-entropy, and take its embeddings."""
    config = RunConfig(
        data=data,
        model=LanguageModelConfig(layers=1, heads=2, width=NETWORK_WIDTH, block=length),
        objective=ObjectiveConfig("ce"),
        fit=FitConfig(steps=steps, batch=32, learning_rate=1e-2, eval_every=steps),
    )
    result = fit(config, out, overwrite=True)
    note = f"a character model of width {NETWORK_WIDTH}, {result.validation_bpc:.2f} bits"
    return of_run(name, out, width, sequences, length, note=note)


def of_run(
    name: str, path: Path, width: int, sequences: int, length: int, *, note: str = "a given run"
) -> Observed:
    """Take what enters the stack of a run, fitted or imported, on its own text.

    Windows are spread evenly over the training text, and as many over the validation text. What
    has more than `width` dimensions is centred and projected on its leading principal directions.
    Centre, directions and unit are those of the training sequences alone.
    """
    run = load_fitted(path)
    texts = corpus_tokens(load_corpus(run.config.data), run.vocabulary)
    tokens, others = (_taken(text, sequences, length) for text in texts)
    parameters = run.parameters_up_to(0)
    train, held_out = (
        np.asarray(run.network.embed(parameters, jnp.asarray(each)), np.float64)
        for each in (tokens, others)
    )
    shown = np.array([list(DisplayedTokens(run.vocabulary, row)) for row in tokens])
    train, held_out, share = project(train, held_out, width)
    note += f"; {width} of {run.network.config.width} directions, {100 * share:.0f} % of variance"
    return Observed(name, train, held_out, note, shown=shown)


def project(
    train: np.ndarray, held_out: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Centre, project on the leading principal directions, and divide by the root mean square.

    Args:
        train: (N, T, D), which decides on the centre, the directions and the unit.
        held_out: (M, T, D).
        width: directions that are kept, d <= D.

    Returns:
        Both of them, (..., T, d), and the share of the variance that is kept.
    """
    rows = train.reshape(-1, train.shape[-1])
    centre = rows.mean(0)
    _, sizes, directions = np.linalg.svd(rows - centre, full_matrices=False)
    kept = [(x - centre) @ directions[:width].T for x in (train, held_out)]
    unit = np.sqrt(np.mean(kept[0] ** 2))
    share = float(np.sum(sizes[:width] ** 2) / np.sum(sizes**2))
    return kept[0] / unit, kept[1] / unit, share


def _config(
    width: int, sequences: int, length: int, *, coupling: str = "bounded"
) -> LatentEmbeddingsConfig:
    return LatentEmbeddingsConfig(
        width=width, coupling=coupling, bound=width**0.5, sequences=sequences, length=length
    )


def _taken(tokens: np.ndarray, sequences: int, length: int) -> np.ndarray:
    plan = windows(len(tokens), block=length).spread(sequences * length)
    taken = plan.take(tokens)[:sequences]
    if taken.shape != (sequences, length):
        raise ValueError(f"a text has {len(taken)} windows: expected at least {sequences}")
    return taken
