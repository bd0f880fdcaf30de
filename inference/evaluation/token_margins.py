"""Margins, certificates and support tokens of every token of a text."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from probattn import support_tokens
from probattn.blocks.promotion import default_promotion
from probattn.inference.evaluation.attention_stages import (
    RunStage,
    stage_margins,
    stage_pasts,
    stage_radii,
    stages,
)
from probattn.inference.evaluation.post_hoc import NOT_CONVERGED, post_hoc_prior, usual_prior
from probattn.inference.evaluation.scoring import window_losses
from probattn.inference.evaluation.stage_certificates import StageCertificate, stage_certificate
from probattn.inference.evaluation.texts import text_tokens
from probattn.inference.pages.notebook import MOST_SHOWN, text_in_notebook
from probattn.inference.pages.page import Page, Past, Series, check_length, page_html
from probattn.inference.runs.csv_tables import write_columns
from probattn.inference.runs.files import check_new, write_text
from probattn.inference.runs.imported import DecoderRun
from probattn.inference.runs.run import FittedRun
from probattn.inference.runtime.memory import check_memory
from probattn.inference.runtime.progress import progress_bar
from probattn.inference.runtime.scratch import scratch_array
from probattn.text.batches import windows
from probattn.text.displayed import DisplayedTokens

# Columns of a stage in tables, and the attributes that they show.
_COLUMNS = {
    "sigma_min": "margin",
    "log_det": "log_det",
    "first_order_embedding_margin": "embedding_margin",
    "certificate": "certificate",
    "support": "support",
}
_NOT_ALWAYS = ("embedding_margin", "certificate")  # which some heads of published models lack
_RADIUS = "certified_radius_over_rms"  # of tables of a text

_TOGETHER = 2**15  # positions of a text whose margins are computed before they are stored
_BYTES = 16  # of each token that a table and a figure of one stage take beside its columns


@dataclass(frozen=True)
class TokenMargins:
    """Margins of one attention stage at every token of a text.

    Every token is reported from one window, the first that holds it, at its position there.

    Attributes:
        label: label of the stage: "post hoc", "trained", or "layer 1 head 1" and so on.
        margin: kind "sigma_min", (N,); NaN where it is not known.
        log_det: log det D_t in nats, -inf where the determinant is not positive, (N,).
        embedding_margin: first-order distance to the boundary in the space of the stage's input,
            in its unit, (N,); NaN of heads of a published model. See
            `attention_stages.StageMargins`, as of the certificate.
        certificate: rho_t, below 1 where the position is proved invertible, (N,).
        support: whether its margin is the smallest of those that its window reports, (N,).
        radius: certified. No change of the stage's input makes D_t singular, if every token moves
            by less than this. It is the root mean square of the coordinates of a token's change,
            in units of that of the input over the text, (N,). So noise is measured, too. None where
            it was not asked for.
    """

    label: str
    margin: Float[np.ndarray, " N"]
    log_det: Float[np.ndarray, " N"]
    embedding_margin: Float[np.ndarray, " N"]
    certificate: Float[np.ndarray, " N"]
    support: Bool[np.ndarray, " N"]
    radius: Float[np.ndarray, " N"] | None = None
    covariance: Past | None = None
    attention: Past | None = None


@dataclass(frozen=True)
class TextMargins:
    """What `text_margins` finds. Of a long text the arrays lie in files without a name.

    Attributes:
        name: name of the text.
        tokens: what each token stands for, a sequence of N strings, whose concatenation is the
            text; the empty text where a token only goes on with the character of the one before.
        position: position of each token within the window that reports it, (N,); tokens 0 and 1
            have no spread in their past and margin 1.
        window: number of that window, (N,).
        window_starts: where each window begins, (windows,).
        stages: margins by stage, the post-hoc attention prior first.
        certificates: what is proved of each stage for all texts, in the same order.
        post_hoc_converged: whether the fit of the post-hoc attention prior came to rest, if it is
            among the stages.
        loss: loss of predicting the token after each, in nats, (N,); NaN for the last. None where
            it was not asked for.
    """

    name: str
    tokens: Sequence[str]
    position: Int[np.ndarray, " N"]
    window: Int[np.ndarray, " N"]
    window_starts: Int[np.ndarray, " windows"]
    stages: tuple[TokenMargins, ...]
    certificates: tuple[StageCertificate, ...]
    post_hoc_converged: bool
    loss: Float[np.ndarray, " N"] | None = None

    def to_html(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a page that shows the text and its margins in a browser, in one file.

        Margins with `details` have on it the loss and the past tokens of every token.

        Args:
            path: HTML file to write.
            overwrite: replace a file that is there.

        Raises:
            ValueError: if something is there, or the text is longer than a page shows.
            WriteError: if the file cannot be written.
        """
        path = Path(path)
        check_new(path, overwrite=overwrite)
        check_length(self.name, len(self.tokens))
        write_text(path, page_html(self.page("run")))
        return path

    def page(self, label: str) -> Page:
        """Return what a page shows of the text, of a run of this label."""
        return Page(
            title=self.name,
            tokens=list(self.tokens),
            index=np.arange(len(self.tokens)),
            window=self.window,
            position=self.position,
            starts=self.window_starts.tolist(),
            series=[stage_series(label, stage) for stage in self.stages],
            of_runs={} if self.loss is None else {label: {"loss": self.loss}},
            notes=[] if self.post_hoc_converged else [NOT_CONVERGED],
            proved=[_proved(each) for each in self.certificates if not math.isnan(each.rho)],
        )

    def _repr_html_(self) -> str:
        first = self.stages[0]
        return text_in_notebook(
            f"{self.name}: {len(self.tokens):,} tokens",
            self.tokens[:MOST_SHOWN],  # of a long text they are made as they are asked for
            first.margin[:MOST_SHOWN],
            first.support[:MOST_SHOWN],
            f"margin (sigma_min), {first.label}",
            {stage.label: stage.margin[self.position >= 2] for stage in self.stages},
            len(self.tokens),
        )


@default_promotion()
def text_margins(
    run: FittedRun,
    text: str | os.PathLike[str] | None = None,
    *,
    stride: int | None = None,
    radius: bool = False,
    all_layers: bool = False,
    post_hoc: bool = False,
    details: bool = False,
    progress: bool = False,
) -> TextMargins:
    """Compute margins of every token of a text, for every attention stage of a run.

    A text longer than a block is read in windows; a token is reported from the first window that
    holds it, so that beyond the first window it has a context of at least block - stride tokens.

    Of a long text, 17 bytes for each token and stage and 8 for each token lie in files without a
    name, in the user's cache; the radius takes 4 more for each token and stage. They are mapped
    into memory, and the system may drop them from it.

    Args:
        run: a run of a fit or of a published model, from `load_run` or `fit`.
        text: UTF-8 file of any length, by default the run's validation text.
        stride: distance between windows, 1 to block; by default half a block.
        radius: compute the certified radius too, which takes two to three times as long as all
            else. Not of heads of a published model.
        all_layers: take the heads of all layers, and not of the first alone. This describes the
            network: only what enters the first layer is what the theory's model generates (paper,
            Corollary 6.1).
        post_hoc: take the post-hoc attention prior of an imported model too, as that of a fit in
            any case. Its own fit, the first time, takes minutes.
        details: compute the loss, too, and which past tokens make the covariance of each and which
            it attends to, for a page; of at most 200,000 tokens.
        progress: show progress bars.

    Raises:
        ValueError: if the stride is out of range, the text cannot be read, is shorter than three
            tokens or has a character that the vocabulary lacks, its margins are larger than the
            memory, it is too long for details, or radii are asked for and no stage has one.
        OSError: if the user's cache has no room for the margins of a long text.
    """
    if radius and isinstance(run, DecoderRun) and not post_hoc:
        raise ValueError("radius: heads of a published model have none: expected False or post_hoc")
    tokens, name = text_tokens(run, text)
    if len(tokens) < 3:
        raise ValueError(f"{name}: has {len(tokens)} tokens: expected at least 3")
    if details:
        check_length(name, len(tokens))
    block = run.network.block
    plan = windows(
        len(tokens), block=block, stride=max(block // 2, 1) if stride is None else stride
    )
    check_memory("the margins of one stage", _BYTES * len(tokens))
    prior = (post_hoc_prior if post_hoc else usual_prior)(run, progress=progress)
    length = len(tokens)
    window, position = (scratch_array(name, length, np.int32) for _ in range(2))
    chosen = list(stages(run, prior, all_layers=all_layers))
    found: list[TokenMargins] = []
    radii: dict[int, np.ndarray] = {}  # by number of the stage
    squares = np.zeros(len(chosen))  # sums of the mean squares of what enters each stage
    losses: list[np.ndarray] = []
    pasts: list[list[tuple[Past, Past]]] = [[] for _ in chosen]
    following = np.append(tokens[1:], tokens[-1:]) if details else tokens
    total, done = len(chosen) * len(plan.numbers), 0
    with progress_bar("margins", total=total, unit="window", visible=progress) as bar:
        for part in plan.parts(_TOGETHER):
            inputs, reported = part.take(tokens), part.reported
            rows = slice(done, done + int(reported.sum()))
            number, position[rows] = np.nonzero(reported)
            window[rows] = np.asarray(part.numbers)[number]
            for order, stage in enumerate(chosen):
                values = reported_margins(run, stage, inputs, reported)
                if order == len(found):
                    found.append(_empty(values, length, name))
                for column in _COLUMNS.values():
                    getattr(found[order], column)[rows] = getattr(values, column)
                if radius and stage.head is None:
                    if order not in radii:
                        radii[order] = scratch_array(name, length, values.margin.dtype)
                    distances, sizes = stage_radii(run, stage, inputs)
                    radii[order][rows] = distances[reported]
                    squares[order] += sizes[reported].sum(dtype=np.float64)
                if details:
                    made = stage_pasts(run, stage, inputs)
                    covariance, attention = (
                        Past(past.behind[reported], past.share[reported]) for past in made
                    )
                    pasts[order].append((covariance, attention))
                bar.update(len(inputs))
            if details:
                targets = part.take(following)
                of_part = window_losses(
                    run.network, run.parameters, inputs, targets, symbols=run.vocabulary.size
                )
                losses.append(of_part[reported])
            done = rows.stop
    if details:
        losses[-1][-1] = np.nan  # nothing comes after the last token
        for order, parts in enumerate(pasts):
            covariance, attention = map(_joined, zip(*parts, strict=True))
            found[order] = replace(found[order], covariance=covariance, attention=attention)
    for order, distances in radii.items():
        np.divide(distances, math.sqrt(squares[order] / length), out=distances)
        found[order] = replace(found[order], radius=distances)
    return TextMargins(
        name=name,
        tokens=DisplayedTokens(run.vocabulary, tokens),
        position=position,
        window=window,
        window_starts=plan.starts,
        stages=tuple(found),
        certificates=tuple(stage_certificate(run, stage) for stage in chosen),
        post_hoc_converged=prior is None or prior.converged,
        loss=np.concatenate(losses) if details else None,
    )


def reported_margins(
    run: FittedRun,
    stage: RunStage,
    inputs: Int[np.ndarray, "windows T"],
    reported: Bool[np.ndarray, "windows T"],
) -> TokenMargins:
    """Return a stage's margins at the reported positions, N in all, window after window."""
    values = stage_margins(run, stage, inputs)
    support = np.zeros_like(reported)
    first = np.asarray(support_tokens(np.where(reported, values.margin, np.inf)))
    np.put_along_axis(support, first, True, axis=1)
    columns = (values.margin, values.log_det, values.embedding_margin, values.certificate, support)
    return TokenMargins(stage.label, *(array[reported] for array in columns))


def _empty(values: TokenMargins, length: int, name: str) -> TokenMargins:
    """Return arrays for so many tokens, of the types of the values of some."""
    margin, log_det, distance, certificate, support = (
        scratch_array(name, length, getattr(values, column).dtype) for column in _COLUMNS.values()
    )
    return TokenMargins(values.label, margin, log_det, distance, certificate, support)


def _joined(pasts: Sequence[Past]) -> Past:
    behind, share = (
        np.concatenate([getattr(past, name) for past in pasts]) for name in ("behind", "share")
    )
    return Past(behind, share)


def stage_series(label: str, stage: TokenMargins) -> Series:
    """Return what a page shows of a stage, of a run of this label."""
    values = {"margin": stage.margin}
    values |= {name: getattr(stage, name) for name in _NOT_ALWAYS if _has(stage, name)}
    if stage.radius is not None:
        values["radius"] = stage.radius
    return Series(label, stage.label, values, stage.support, stage.covariance, stage.attention)


def _proved(certificate: StageCertificate) -> str:
    said = "no text can" if certificate.rho < 1 else "a text may"
    return f"{certificate.label}: {said} fold it (rho = {certificate.rho:.2f})."


def write_csv(margins: TextMargins, path: Path) -> None:
    """Write a table with a row per token and, per stage, its columns."""
    columns: dict[str, Sequence | np.ndarray] = {
        "index": range(len(margins.tokens)),
        "token": margins.tokens,
        "window": margins.window,
        "position": margins.position,
        **stage_columns(margins.stages),
    }
    write_columns(path, columns)


def stage_columns(stages: Sequence[TokenMargins]) -> dict[str, np.ndarray]:
    """Return columns of a table with a row per token, of each stage and named after it."""
    columns = {}
    for stage in stages:
        prefix = stage.label.replace(" ", "_")
        for column, name in _COLUMNS.items():
            if _has(stage, name):
                columns[f"{prefix}_{column}"] = getattr(stage, name)
        if stage.radius is not None:
            columns[f"{prefix}_{_RADIUS}"] = stage.radius
    return columns


def _has(stage: TokenMargins, name: str) -> bool:
    return name not in _NOT_ALWAYS or not np.isnan(getattr(stage, name)).all()
