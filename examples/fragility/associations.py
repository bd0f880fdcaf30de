"""How harms go with predictors: rank statistics, with a bootstrap over documents.

Ranks are those of all tokens, and anew of each resample, in which repeated tokens share the mean of
their ranks. Ranks among the tokens of one type are those of the whole text in every resample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from probattn.inference.evaluation.intervals import Estimate, bootstrap
from probattn.inference.evaluation.margin_comparisons import ranks_within

Columns = Mapping[str, np.ndarray]
_ROUNDING = 1e-9  # share of a variance below which nothing is left of it


@dataclass(frozen=True)
class Association:
    """How one harm goes with one predictor.

    Attributes:
        harm: name of the harm.
        predictor: name of the predictor.
        tokens: at how many tokens both are known.
        rank_correlation: Spearman's.
        auc: probability that the predictor is larger at one of the worst tokens than at another.
        partial: of the ranks less their mean over the type, given the ranks of the controls; NaN
            of a control, and of what is the same at all tokens of a type.
        partial_placed: the same, given the ranks of the place too; NaN without one, and of it.
        within_type: of ranks among the tokens of one type.
        beyond: modulus of the rank correlation less the largest of a rival; NaN of rivals.
    """

    harm: str
    predictor: str
    tokens: int
    rank_correlation: Estimate
    auc: Estimate
    partial: Estimate
    partial_placed: Estimate
    within_type: Estimate
    beyond: Estimate


STATISTICS = ("rank_correlation", "auc", "partial", "partial_placed", "within_type", "beyond")


def associations(
    harms: Columns,
    predictors: Columns,
    document: np.ndarray,
    kind: np.ndarray,
    *,
    rivals: Sequence[str],
    controls: Sequence[str],
    place: str | None = None,
    worst: float,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Association]:
    """Compute every association of a harm with a predictor, with 95 % percentile intervals.

    Args:
        harms: harms by name, (N,) each, NaN where not known.
        predictors: predictors by name, likewise; rivals and controls are known everywhere.
        document: document of each token, which the bootstrap draws, (N,).
        kind: type of each token, an integer, (N,).
        rivals: names of the predictors that others are compared with.
        controls: names of the predictors that partial correlations hold fixed.
        place: name of the predictor that `partial_placed` holds fixed too.
        worst: share of tokens that are the worst: those whose harm is in its upper tail.
        resamples: texts that the bootstrap draws.
        seed: of the bootstrap.
    """
    found = {}
    places = [] if place is None else [place]
    for of_harms in _by_known(harms):
        for of_predictors in _by_known(predictors):
            first_harm, first = harms[of_harms[0]], predictors[of_predictors[0]]
            rows = ~np.isnan(first_harm) & ~np.isnan(first)
            if len(np.unique(document[rows])) < 2:
                continue
            names = list(dict.fromkeys([*rivals, *controls, *places, *of_predictors]))
            group = _Group(
                {name: harms[name][rows] for name in of_harms},
                {name: predictors[name][rows] for name in names},
                np.unique(document[rows], return_inverse=True)[1],
                np.unique(kind[rows], return_inverse=True)[1],
                rivals,
                controls,
                places,
                worst,
            )
            values = bootstrap(group.statistic, group.documents, resamples=resamples, seed=seed)
            parts = np.array(values).reshape(len(STATISTICS), len(of_harms), len(names), 3)
            for i, harm in enumerate(of_harms):
                for predictor in of_predictors:
                    j = names.index(predictor)
                    estimates = (Estimate(*map(float, part[i, j])) for part in parts)
                    found[harm, predictor] = Association(
                        harm, predictor, int(rows.sum()), *estimates
                    )
    return [found[h, p] for h in harms for p in predictors if (h, p) in found]


def _by_known(columns: Columns) -> list[list[str]]:
    """Put together the names of columns that are known at the same tokens."""
    groups: dict[bytes, list[str]] = {}
    for name, values in columns.items():
        groups.setdefault(np.isnan(values).tobytes(), []).append(name)
    return list(groups.values())


class _Group:
    """Harms and predictors that are known at the same tokens."""

    def __init__(
        self,
        harms: Columns,
        predictors: Columns,
        document: np.ndarray,
        kind: np.ndarray,
        rivals: Sequence[str],
        controls: Sequence[str],
        places: Sequence[str],
        worst: float,
    ) -> None:
        values = np.array([*harms.values(), *predictors.values()])
        names = list(predictors)
        self._harms, self._document = len(harms), document
        self.documents = int(document.max()) + 1
        self._ranks = WeightedRanks(values)
        self._worst = np.array([h >= np.quantile(h, 1 - worst) for h in harms.values()], float)
        ones = np.ones(len(kind))
        self._of_type = sparse.csr_array((ones, (kind, np.arange(len(kind)))))
        self._controls = [self._harms + names.index(name) for name in controls]
        self._places = [self._harms + names.index(name) for name in places]
        self._rivals = [names.index(name) for name in rivals]
        repeated = np.bincount(kind)[kind] > 1  # of a type that is there once no rank is known
        inside = np.zeros(values.shape)
        inside[:, repeated] = [ranks_within(row[repeated], kind[repeated]) for row in values]
        # Sums and products over each document, of which resamples are sums.
        moments = np.vstack([inside, repeated])
        self._inside = np.stack(
            [moments[:, at] @ moments[:, at].T for at in map(self._at, range(self.documents))]
        )

    def _at(self, number: int) -> np.ndarray:
        return np.flatnonzero(self._document == number)

    def statistic(self, counts: np.ndarray) -> np.ndarray:
        """Compute all statistics of resamples, given how often each document was drawn."""
        return np.stack([self._of_resample(each) for each in counts], axis=-1)

    def _of_resample(self, counts: np.ndarray) -> np.ndarray:
        h, weights = self._harms, counts[self._document].astype(float)
        ranks = self._ranks(weights)
        weighted = ranks * weights
        products = weighted @ ranks.T
        correlation = _correlations(products)[:h, h:]
        moduli = abs(correlation)
        beyond = moduli - moduli[:, self._rivals].max(axis=1, keepdims=True)
        beyond[:, self._rivals] = np.nan

        positives = (self._worst * weights).sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample without the worst tokens
            above = self._worst @ weighted[h:].T / (positives * (weights.sum() - positives))

        sizes = self._of_type @ weights
        sums = self._of_type @ weighted.T
        there = sizes > 0
        inside_types = products - sums[there].T @ (sums[there] / sizes[there, None])
        partial = _partial(inside_types, np.diag(products), self._controls)[:h, h:]
        placed = np.full_like(partial, np.nan)
        if self._places:
            controls = [*self._controls, *self._places]
            placed = _partial(inside_types, np.diag(products), controls)[:h, h:]

        moments = np.tensordot(counts.astype(float), self._inside, 1)
        mean = moments[:-1, -1]
        with np.errstate(invalid="ignore", divide="ignore"):
            within = moments[:-1, :-1] - np.outer(mean, mean) / moments[-1, -1]
        within = _correlations(within)[:h, h:]
        return np.stack([correlation, above + 0.5, partial, placed, within, beyond]).ravel()


class WeightedRanks:
    """Ranks of columns whose observations are repeated, less their mean.

    Args:
        values: columns, (K, N).
    """

    def __init__(self, values: np.ndarray) -> None:
        self._orders = np.argsort(values, axis=1, kind="stable")
        ordered = np.take_along_axis(values, self._orders, axis=1)
        new = np.ones(values.shape, bool)
        new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        self._starts = [np.flatnonzero(row) for row in new]
        self._groups = np.cumsum(new, axis=1) - 1

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Rank the columns, each observation as often as its weight says; (K, N)."""
        found = np.empty(self._orders.shape)
        total = weights.sum()
        for row, (order, starts, group) in enumerate(
            zip(self._orders, self._starts, self._groups, strict=True)
        ):
            sizes = np.add.reduceat(weights[order], starts)
            middles = np.cumsum(sizes) - sizes / 2 - total / 2
            found[row, order] = middles[group]
        return found


def _correlations(products: np.ndarray) -> np.ndarray:
    size = np.sqrt(np.maximum(np.diag(products), 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return products / np.outer(size, size)


def _partial(products: np.ndarray, before: np.ndarray, controls: list[int]) -> np.ndarray:
    """Return correlations of what the controls do not explain, NaN where nothing is left."""
    of_controls = products[np.ix_(controls, controls)]
    explained = products[:, controls] @ np.linalg.lstsq(of_controls, products[controls])[0]
    left = products - explained
    nothing = np.diag(left) <= _ROUNDING * before
    left[nothing] = left[:, nothing] = np.nan
    return _correlations(left)
