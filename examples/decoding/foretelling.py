"""The questions as numbers: predictors, answers, and how well the ones foretell the others."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from decoding_questions import (
    AHEAD,
    COUNTED,
    FIRST,
    PERMUTED,
    PRIMARY,
    PROMPT,
    RIVALS,
    TEMPERATURES,
    WINDOW,
    WORST,
)
from loops import trailing_sum

from probattn.inference.evaluation.intervals import (
    Estimate,
    area_under_curve,
    bootstrap,
    spearman,
)

Columns = Mapping[str, np.ndarray]
_SMALL_WARNS = ("margin", "permuted_margin")  # beginnings of names


@dataclass(frozen=True)
class Question:
    """Tokens, what is known of them, and what is to be foretold.

    Attributes:
        name: of the question.
        predictors: what warns where it is large, by name, (N,) each.
        positive: where the answer is yes, (N,).
        article: article of each token, which the bootstrap draws, (N,).
        amount: what the answer is the largest part of, (N,), or None.
    """

    name: str
    predictors: Columns
    positive: np.ndarray
    article: np.ndarray
    amount: np.ndarray | None = None


@dataclass(frozen=True)
class Answer:
    """How well a predictor foretells.

    Attributes:
        question: name of the question.
        predictor: name of the predictor.
        tokens: how many tokens are counted.
        positives: at how many of them the answer is yes.
        articles: how many articles the tokens are of.
        auc: probability that the predictor warns more where the answer is yes.
        beyond: modulus of `auc` less one half, less the largest of a rival; NaN of rivals.
        rank_correlation: Spearman's with the amount, NaN without one.
    """

    question: str
    predictor: str
    tokens: int
    positives: int
    articles: int
    auc: Estimate
    beyond: Estimate
    rank_correlation: Estimate


def questions(generated: Columns, text: Columns, *, seed: int) -> Iterator[Question]:
    """Put the questions of `README.md`, of the two tables of tokens."""
    for temperature in TEMPERATURES:
        rows = generated["temperature"] == temperature
        name = f"loop_{temperature:g}" if temperature else "loop_greedy"
        yield _loops(name, {each: values[rows] for each, values in generated.items()}, seed)
    yield _rising(text, seed)


def _loops(name: str, columns: Columns, seed: int) -> Question:
    known = _predictors(columns, COUNTED - FIRST)
    position, loop = columns["position"], columns["loop"]
    ahead = np.where(loop < 0, np.inf, loop - position)
    counted = (position >= PROMPT - 1) & (ahead > 0)
    return Question(
        name,
        _with_control({each: values[counted] for each, values in known.items()}, seed),
        ahead[counted] <= AHEAD,
        columns["article"][counted].astype(int),
    )


def _rising(columns: Columns, seed: int) -> Question:
    length = WINDOW - FIRST
    known = _predictors(columns, length)
    losses = trailing_sum(columns["loss"].reshape(-1, length)) / AHEAD
    amount = np.full(losses.shape, np.nan)
    amount[:, AHEAD - 1 : -AHEAD] = losses[:, 2 * AHEAD - 1 :] - losses[:, AHEAD - 1 : -AHEAD]
    counted = ~np.isnan(amount.ravel())
    amount = amount.ravel()[counted]
    return Question(
        "rising_loss",
        _with_control({each: values[counted] for each, values in known.items()}, seed),
        amount >= np.quantile(amount, 1 - WORST),
        columns["article"][counted].astype(int),
        amount,
    )


def _predictors(columns: Columns, length: int) -> dict[str, np.ndarray]:
    """Return all predictors of sequences of so many tokens, means and minima among them."""
    heads = {name: values for name, values in columns.items() if name.startswith("margin_head_")}
    worst = np.min(list(heads.values()), axis=0)
    here = np.minimum(np.arange(length) + 1, AHEAD)

    def mean(values: np.ndarray) -> np.ndarray:
        return (trailing_sum(values.reshape(-1, length)) / here).ravel()

    padded = np.pad(worst.reshape(-1, length), [(0, 0), (AHEAD - 1, 0)], constant_values=np.inf)
    least = np.lib.stride_tricks.sliding_window_view(padded, AHEAD, axis=1).min(-1)
    of_token = ("loss", "entropy", "probability", "repeated", "position")
    return {
        PRIMARY: worst,
        f"{PRIMARY}_mean": mean(worst),
        f"{PRIMARY}_least": least.ravel(),
        **heads,
        **{name: columns[name] for name in of_token},
        "loss_mean": mean(columns["loss"]),
        "entropy_mean": mean(columns["entropy"]),
    }


def _with_control(predictors: Columns, seed: int) -> dict[str, np.ndarray]:
    """Add the control, and turn what warns where it is small."""
    shuffled = np.random.default_rng(seed).permutation(predictors[PRIMARY])
    found = {**predictors, PERMUTED: shuffled}
    return {
        name: -values if name.startswith(_SMALL_WARNS) else values for name, values in found.items()
    }


def answers(question: Question, *, resamples: int, seed: int) -> list[Answer]:
    """Answer a question with every predictor, with 95 % intervals of a bootstrap over articles."""
    names = list(question.predictors)
    values = [np.asarray(each, float) for each in question.predictors.values()]
    articles, number = np.unique(question.article, return_inverse=True)
    rivals = [names.index(name) for name in RIVALS]

    def statistic(counts: np.ndarray) -> np.ndarray:
        weights = counts[:, number]
        auc = area_under_curve(question.positive, values, weights)
        size = abs(auc - 0.5)
        beyond = size - size[rivals].max(axis=0)
        beyond[rivals] = np.nan
        rank = np.full_like(auc, np.nan)
        if question.amount is not None:
            rank = spearman(question.amount, values, weights)
        return np.concatenate([auc, beyond, rank])

    found = bootstrap(statistic, len(articles), resamples=resamples, seed=seed)
    count = len(names)
    return [
        Answer(
            question.name,
            name,
            len(number),
            int(question.positive.sum()),
            len(articles),
            *found[place::count],
        )
        for place, name in enumerate(names)
    ]
