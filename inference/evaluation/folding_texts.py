"""Texts that fold an attention stage, found by search: what no certificate can rule out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from probattn.blocks.geometry import bounded
from probattn.blocks.majorants import majorants
from probattn.blocks.promotion import default_promotion
from probattn.inference.evaluation.attention_stages import (
    POST_HOC,
    RunStage,
    stage_margins,
    stage_table,
    stages,
)
from probattn.inference.evaluation.post_hoc import post_hoc_prior, usual_prior
from probattn.inference.evaluation.stage_certificates import StageCertificate, stage_certificate
from probattn.inference.runs.run import FittedRun
from probattn.inference.runtime.blas_threads import one_blas_thread
from probattn.inference.runtime.progress import progress_bar

_PAIRS = 32  # pairs of symbols of which texts are made at first
_STARTS = 4  # texts that are improved, position by position
_SWEEPS = 3  # over all positions of such a text
_FOLDED = 1.01  # of the largest real eigenvalue, beyond which a text need not be improved
_BATCH = 1024  # texts in one step
_MOST_SYMBOLS = 4096
_MANY = 256  # texts, spread over all, whose blocks are looked at; the best of them are improved


@dataclass(frozen=True)
class FoldingText:
    """A text at whose last token an attention stage is infeasible.

    Attributes:
        label: label of the stage.
        tokens: symbols of the text, (T,).
        text: the text.
        margin: that of the last token, kind "sigma_min", not positive.
    """

    label: str
    tokens: Int[np.ndarray, " T"]
    text: str
    margin: float


def folding_text(run: FittedRun, stage: RunStage) -> FoldingText | None:
    """Look for a text of one window at whose last token a stage folds; None if none was found.

    Two tokens fold a context best where equal weights are on both, and their difference d makes
    d^T A d / 4 large. So texts of two symbols and a last one are tried first: those pairs for which
    that number is largest, in all proportions, with every last symbol. The best of them are then
    improved symbol by symbol. The search draws nothing at random. That it finds nothing proves
    nothing; `table_certificate` does.
    """
    search = _Search(run, stage)
    with one_blas_thread():
        starts = search.two_symbol_texts()
    for start in starts:
        with one_blas_thread():
            tokens = search.improved(start)
        margin = float(stage_margins(run, stage, tokens[None]).margin[0, -1])
        if margin <= 0:
            return FoldingText(stage.label, tokens, run.vocabulary.decode(tokens), margin)
    return None


@default_promotion()
def folding_texts(
    run: FittedRun,
    certificates: Sequence[StageCertificate] | None = None,
    *,
    progress: bool = False,
) -> dict[str, FoldingText | None]:
    """Look for a text that folds each attention stage of a run for which none is ruled out.

    That none is found proves nothing.

    Args:
        run: a run from `load_run` or `fit`.
        certificates: what is proved of stages, as `text_margins` returns it; by default of those
            that it takes by default.
        progress: show progress bars.

    Returns:
        By label of the stage, the text, or None if none was found. Stages that no text can fold
        are left out, those of which nothing is known, and all those of a vocabulary of more than
        4,096 symbols, whose pairs are too many.
    """
    prior = usual_prior(run, progress=progress)
    if certificates is None:
        certificates = [stage_certificate(run, stage) for stage in stages(run, prior)]
    folding = {proved.label for proved in certificates if proved.rho >= 1}
    if run.vocabulary.size > _MOST_SYMBOLS or not folding:
        return {}
    if prior is None and POST_HOC in folding:
        prior = post_hoc_prior(run, progress=progress)
    open_stages = [stage for stage in stages(run, prior) if stage.label in folding]
    found = {}
    with progress_bar("folds", total=len(open_stages), unit="stage", visible=progress) as bar:
        for stage in open_stages:
            bar.show(stage=stage.label)
            found[stage.label] = folding_text(run, stage)
            bar.update(1)
    return found


class _Search:
    """Texts of a stage, and how nearly each of them folds it at its last token.

    That is the largest real eigenvalue of Sigma_t A, which is 1 at the boundary.
    """

    def __init__(self, run: FittedRun, stage: RunStage) -> None:
        table = stage_table(run, stage)
        seen = np.asarray(bounded(table, stage.bound), float)
        factors = majorants(stage.w_query, stage.w_key)
        query, key = (np.asarray(factor, float) for factor in (factors.queries, factors.keys))
        self._queries, self._keys = seen @ query, seen @ key  # (V, T, m), of the past
        self._own = table[:, -1] @ query  # (V, m), of the last token
        self._symbols, self._length = table.shape[:2]

    def two_symbol_texts(self) -> Int[np.ndarray, "starts T"]:
        """Return the best texts of two symbols, one after the other, and a last one."""
        place = self._length // 2
        queries, keys = self._queries[:, place], self._keys[:, place]
        # d^T A d of the difference of two symbols is (q_a - q_b) . (k_a - k_b).
        product = queries @ keys.T
        own = np.diagonal(product)
        attraction = own[:, None] + own - product - product.T
        first, second = np.unravel_index(
            np.argsort(-attraction, axis=None)[: 2 * _PAIRS], attraction.shape
        )
        counts = np.unique(np.geomspace(1, self._length - 2, 8).astype(int))
        texts = np.empty((len(first), len(counts), self._symbols, self._length), np.int32)
        texts[..., -1] = np.arange(self._symbols)
        for row, (a, b) in enumerate(zip(first, second, strict=True)):
            for column, count in enumerate(counts):
                texts[row, column, :, :count] = a
                texts[row, column, :, count:-1] = b
        return self._best(texts.reshape(-1, self._length), _STARTS)

    def improved(self, tokens: Int[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
        """Return a text that folds the stage more, by changing one symbol after the other."""
        for place in list(range(self._length - 1, -1, -1)) * _SWEEPS:
            others = np.repeat(tokens[None], self._symbols, axis=0)
            others[:, place] = np.arange(self._symbols)
            nearness = self._nearness(others)
            tokens = others[np.argmax(nearness)]
            if nearness.max() > _FOLDED:
                break
        return tokens

    def _best(self, texts: Int[np.ndarray, "n T"], count: int) -> Int[np.ndarray, "count T"]:
        """Return the best of many texts; those of largest attraction are looked at more closely."""
        near = texts[np.argsort(-self._attraction(texts))[:_MANY]]
        return near[np.argsort(-self._nearness(near))[:count]]

    def _attraction(self, texts: Int[np.ndarray, "n T"]) -> Float[np.ndarray, " n"]:
        """Return the trace of Sigma_t A: w_a w_b d^T A d where only two tokens differ."""
        found = []
        for start in range(0, len(texts), _BATCH):
            weights, queries, keys = self._past(texts[start : start + _BATCH])
            means = (np.einsum("ns,nsm->nm", weights, part) for part in (queries, keys))
            products = np.einsum("ns,nsm,nsm->n", weights, queries, keys)
            found.append(products - np.einsum("nm,nm->n", *means))
        return np.concatenate(found)

    def _nearness(self, texts: Int[np.ndarray, "n T"]) -> Float[np.ndarray, " n"]:
        """Return the largest real eigenvalue of Sigma_t A; -inf where all are complex."""
        weights, queries, keys = self._past(texts)
        queries, keys = (
            part - np.einsum("ns,nsm->nm", weights, part)[:, None] for part in (queries, keys)
        )
        blocks = np.swapaxes(weights[..., None] * queries, -1, -2) @ keys
        eigenvalues = np.linalg.eigvals(blocks)
        return np.where(eigenvalues.imag == 0, eigenvalues.real, -np.inf).max(-1)

    def _past(self, texts: Int[np.ndarray, "n T"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the last token's attention weights, and queries and keys of the tokens before."""
        place = np.arange(self._length - 1)
        queries, keys = (part[texts[:, :-1], place] for part in (self._queries, self._keys))
        logits = np.einsum("nm,nsm->ns", self._own[texts[:, -1]], keys)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True), queries, keys
