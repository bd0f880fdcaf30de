"""How the increase of a loss compares with margins: statistics of tokens, with their intervals.

What a margin and a loss have in common may be neither's doing: a context grows with the position in
the window, frequent symbols are near each other, and a prediction that was poor without noise has
less to lose. So each comparison is made among all tokens, and among those that share one of these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from probattn.inference.evaluation.intervals import LEVEL, Estimate, bootstrap, ratio, spearman
from probattn.inference.evaluation.token_margins import TokenMargins

QUANTITIES = ("margin", "embedding_margin")

_RESAMPLES = 1000
_GROUPS = 10  # groups of tokens in a figure
_LOSS_GROUPS = 20


@dataclass(frozen=True)
class MarginComparison:
    """Increase of the loss under noise, compared with the margins of one attention stage.

    Attributes:
        stage: label of the stage.
        statistic: "margin" or "embedding_margin": Spearman's rank correlation with the increase,
            below 0 if noise harms most where the margin is small; "support": mean increase at
            support tokens less that at other tokens, in nats, above 0 if it harms most there.
        within: among which tokens: "text", all; or those at the same "position" of their windows,
            of the same "token", or in the same twentieth by "loss" without noise. Then ranks are
            those among such tokens, over how many they are, and increases are taken from their
            mean.
        estimate: the estimate with its 95 % interval.
    """

    stage: str
    statistic: str
    within: str
    estimate: Estimate


@dataclass(frozen=True)
class SupportCharacter:
    """How often a symbol is a support token.

    Attributes:
        stage: label of the attention stage.
        token: the symbol.
        support: support tokens that are this symbol.
        share: fraction of all support tokens, with its 95 % interval (Wilson's).
        positions: tokens at positions >= 2 that are this symbol.
        base: their share of all tokens there, what chance would give.
    """

    stage: str
    token: str
    support: int
    share: Estimate
    positions: int
    base: float


def compare_with_margins(
    loss: Float[np.ndarray, " N"],
    noisy_loss: Float[np.ndarray, " N"],
    margins: Sequence[TokenMargins],
    symbols: Int[np.ndarray, " N"],
    window: Int[np.ndarray, " N"],
    position: Int[np.ndarray, " N"],
    *,
    seed: int,
) -> list[MarginComparison]:
    """Compare the increase of the loss with the margins of every attention stage.

    Intervals are those of a bootstrap over windows with 1000 resamples, in which ranks and means
    among the tokens that share something are held fixed.

    Args:
        loss: at each token without noise, in nats.
        noisy_loss: under noise.
        margins: margins by stage.
        symbols: symbol of each token.
        window: number of each token's window, from 0 on; at least two of them.
        position: position of each token in its window; those at 0 and 1 are left out.
        seed: seed of the bootstrap.
    """
    inner = position >= 2
    loss, window = loss[inner], window[inner]
    increase = noisy_loss[inner] - loss
    quantities = [getattr(stage, name)[inner] for stage in margins for name in QUANTITIES]
    known = [~np.isnan(values) for values in quantities]
    supports = [stage.support[inner] for stage in margins]
    groups = {
        "text": np.zeros(len(loss), int),
        "position": position[inner],
        "token": symbols[inner],
        "loss": _quantile_groups(loss, _LOSS_GROUPS),
    }
    ranks = [
        [ranks_within(values, group) for values in (increase, *quantities)]
        for group in groups.values()
    ]
    centred = [increase - _means_within(increase, group) for group in groups.values()]

    def statistic(counts: Int[np.ndarray, "resamples windows"]) -> np.ndarray:
        weights = counts[:, window]
        correlations = [
            _correlations(of_increase, rest, known, weights) for of_increase, *rest in ranks
        ]
        differences = [_differences(values, supports, weights) for values in centred]
        return np.concatenate([*correlations, *differences])

    found = bootstrap(statistic, int(window.max()) + 1, resamples=_RESAMPLES, seed=seed)
    labels = [stage.label for stage in margins]
    names = [(each, name, within) for within in groups for each in labels for name in QUANTITIES]
    names += [(each, "support", within) for within in groups for each in labels]
    compared = [
        MarginComparison(*name, estimate) for name, estimate in zip(names, found, strict=True)
    ]
    return sorted(compared, key=lambda each: labels.index(each.stage))


def _correlations(
    of_increase: Float[np.ndarray, " N"],
    others: Sequence[Float[np.ndarray, " N"]],
    known: Sequence[Bool[np.ndarray, " N"]],
    weights: Int[np.ndarray, "resamples N"],
) -> Float[np.ndarray, "others resamples"]:
    """Compute rank correlations, each of the tokens at which the other quantity is known."""
    if all(each.all() for each in known):
        return spearman(of_increase, others, weights)
    pairs = zip(others, known, strict=True)
    return np.concatenate([spearman(of_increase, [other], weights * at) for other, at in pairs])


def increase_by_margin(
    increase: Float[np.ndarray, " N"],
    values: Float[np.ndarray, " N"],
    window: Int[np.ndarray, " N"],
    position: Int[np.ndarray, " N"],
) -> Float[np.ndarray, "groups 3"]:
    """Average the increase of the loss in ten groups of tokens by margin, with intervals.

    The groups have about as many tokens each, without those at positions 0 and 1 and those whose
    margin is not known. Equal margins stay together, so a group may be empty, its row NaN. The
    intervals are those of `ratio`.

    Args:
        increase: increase of the loss at each token, in nats.
        values: a margin of each token.
        window: number of each token's window, from 0 on.
        position: position of each token in its window.
    """
    inner, windows = (position >= 2) & ~np.isnan(values), window.max() + 1
    increase, values, window = increase[inner], values[inner], window[inner]
    group = _quantile_groups(values, _GROUPS)
    rows = []
    for number in range(_GROUPS):
        at = group == number
        sums, counts = (
            np.bincount(window[at], weights, minlength=windows)
            for weights in (increase[at], np.ones(at.sum()))
        )
        rows.append(ratio(sums, counts) if at.any() else Estimate(np.nan, np.nan, np.nan))
    return np.array(rows)


def ranks_within(
    values: Float[np.ndarray, " N"], group: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Return each value's rank in its group, less the group's mean rank, over the group's size.

    A value that is NaN counts for nothing and has rank 0.
    """
    from scipy.stats import rankdata

    found = np.empty(len(values))
    for each in np.unique(group):
        at = group == each
        size = np.count_nonzero(~np.isnan(values[at]))
        ranks = rankdata(values[at], nan_policy="omit")
        found[at] = np.nan_to_num((ranks - (size + 1) / 2) / max(size, 1))
    return found


def _means_within(
    values: Float[np.ndarray, " N"], group: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    return (np.bincount(group, values) / np.maximum(np.bincount(group), 1))[group]


def _quantile_groups(values: Float[np.ndarray, " N"], count: int) -> Int[np.ndarray, " N"]:
    """Return each value's group, 0 to count - 1; equal values are in the same one."""
    from scipy.stats import rankdata

    return np.ceil(rankdata(values) / len(values) * count).astype(int) - 1


def _differences(
    values: Float[np.ndarray, " N"],
    supports: Sequence[np.ndarray],
    weights: Int[np.ndarray, "resamples N"],
) -> Float[np.ndarray, "stages resamples"]:
    """Return the weighted mean of the values at support tokens less that at the others."""
    repeated = weights.astype(np.float64)
    with np.errstate(invalid="ignore"):  # a resample of few windows may hold no support token
        return np.array(
            [
                repeated @ (values * support) / (repeated @ support)
                - repeated @ (values * ~support) / (repeated @ ~support)
                for support in supports
            ]
        )


def support_characters(
    margins: TokenMargins,
    symbols: Int[np.ndarray, " N"],
    position: Int[np.ndarray, " N"],
    strings: Mapping[int, str],
) -> list[SupportCharacter]:
    """Count how often each symbol is a support token of a stage, the most frequent first.

    Args:
        margins: margins of the stage.
        symbols: the symbol of each token.
        position: position of each token in its window.
        strings: what each symbol stands for.
    """
    from scipy.stats import binomtest

    inner = position >= 2
    symbols, support = symbols[inner], margins.support[inner]
    total, found = int(support.sum()), []
    for symbol, count in zip(*np.unique(symbols[support], return_counts=True), strict=True):
        interval = binomtest(int(count), total).proportion_ci(LEVEL, method="wilson")
        share = Estimate(count / total, float(interval.low), float(interval.high))
        positions = int((symbols == symbol).sum())
        base = positions / len(symbols)
        found.append(
            SupportCharacter(margins.label, strings[symbol], int(count), share, positions, base)
        )
    return sorted(found, key=lambda each: -each.support)
