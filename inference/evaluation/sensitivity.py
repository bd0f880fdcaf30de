"""Whether noise harms the predictions most at the tokens of small margin: loss and margin by token.

The paper takes the tokens of smallest margin, the support tokens, for those that decide how robust
a model is. So each token of a text gets a row: the loss of the prediction made at it, that of the
token after it, without noise and under noise, beside its margins.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from probattn.blocks.promotion import default_promotion
from probattn.inference.evaluation.attention_stages import stages
from probattn.inference.evaluation.margin_comparisons import (
    MarginComparison,
    SupportCharacter,
    compare_with_margins,
    support_characters,
)
from probattn.inference.evaluation.noise_sweeps import (
    check_kinds,
    check_levels,
    training_frequencies,
)
from probattn.inference.evaluation.perturbations import NoiseKind, perturbation
from probattn.inference.evaluation.post_hoc import NOT_CONVERGED, usual_prior
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.evaluation.texts import check_seed, text_tokens
from probattn.inference.evaluation.token_margins import (
    TokenMargins,
    reported_margins,
    stage_columns,
    stage_series,
)
from probattn.inference.pages.notebook import text_in_notebook
from probattn.inference.pages.page import Page, page_html
from probattn.inference.runs.csv_tables import write_table
from probattn.inference.runs.files import check_new, write_text
from probattn.inference.runs.run import FittedRun
from probattn.inference.runtime.progress import progress_bar


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` finds, for N tokens of a text.

    Attributes:
        name: name of the text.
        kind: kind of the noise.
        level: standard deviation in units of the embedding's root mean square; of substitution
            the probability of a token to be replaced.
        index: index of each token in the text, (N,).
        tokens: what each stands for, N strings; the empty text where a token only goes on with
            the character of the one before.
        window: number of its window, (N,).
        position: position of each token in its window, (N,).
        loss: loss of predicting the token after it, in nats, (N,).
        noisy_loss: the same under noise, the mean over draws, (N,).
        stages: margins, the post-hoc attention prior first, then the trained one where there is
            one, and the heads of the first layer.
        comparisons: comparisons for each stage: three statistics among four sets of tokens.
        characters: symbols that are support tokens, by stage, most frequent first.
        post_hoc_converged: whether the fit of the post-hoc attention prior came to rest.
    """

    name: str
    kind: NoiseKind
    level: float
    index: Int[np.ndarray, " N"]
    tokens: Sequence[str]
    window: Int[np.ndarray, " N"]
    position: Int[np.ndarray, " N"]
    loss: Float[np.ndarray, " N"]
    noisy_loss: Float[np.ndarray, " N"]
    stages: tuple[TokenMargins, ...]
    comparisons: tuple[MarginComparison, ...]
    characters: tuple[SupportCharacter, ...]
    post_hoc_converged: bool

    def to_html(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a page that shows the text, margins and losses in a browser, in one file.

        Args:
            path: HTML file to write.
            overwrite: replace a file that is there.

        Raises:
            ValueError: if something is there, or the text is longer than a page shows.
            WriteError: if the file cannot be written.
        """
        path = Path(path)
        check_new(path, overwrite=overwrite)
        losses = {
            "loss": self.loss,
            "noisy_loss": self.noisy_loss,
            "increase": self.noisy_loss - self.loss,
        }
        unit = "" if self.kind == "substitution" else " of the embeddings' root mean square"
        page = Page(
            title=self.name,
            tokens=self.tokens,
            index=self.index,
            window=self.window,
            position=self.position,
            starts=np.flatnonzero(np.diff(self.window, prepend=-1)).tolist(),
            breaks=(1 + np.flatnonzero(np.diff(self.index) != 1)).tolist(),
            series=[stage_series("run", stage) for stage in self.stages],
            of_runs={"run": losses},
            notes=[
                f"Noise: {self.kind}, {self.level:g}{unit}.",
                *([] if self.post_hoc_converged else [NOT_CONVERGED]),
            ],
        )
        write_text(path, page_html(page))
        return path

    def _repr_html_(self) -> str:
        first, increase = self.stages[0], self.noisy_loss - self.loss
        margins = {stage.label: stage.margin[self.position >= 2] for stage in self.stages}
        return text_in_notebook(
            f"{self.name}: {len(self.tokens):,} tokens, {self.kind} noise of {self.level:g}",
            self.tokens,
            first.margin,
            first.support,
            f"margin (sigma_min), {first.label}",
            {**margins, "increase of the loss (nats)": increase},
            len(self.tokens),
        )


@default_promotion()
def sensitivity(
    run: FittedRun,
    text: str | os.PathLike[str] | None = None,
    *,
    noise_kind: NoiseKind = "gaussian",
    level: float = 0.5,
    draws: int = 8,
    most_tokens: int = 16_384,
    seed: int = 0,
    progress: bool = False,
) -> Sensitivity:
    """Compare how much noise raises the loss at each token with the token's margins.

    Windows are a block long and do not overlap.

    Args:
        run: a run from `load_run` or `fit`.
        text: UTF-8 file, by default the run's validation text.
        noise_kind: see `perturbations`.
        level: level of the noise, in units of the embedding's root mean square; for substitution
            the probability of a token to be replaced.
        draws: number of draws of the noise, over which losses are averaged; a worst-case direction
            has one.
        most_tokens: at most so many tokens, in windows spread evenly over the text.
        seed: seed of the noise and the bootstrap.
        progress: show a progress bar.

    Raises:
        ValueError: if an argument is out of range, or the text cannot be read, has a character
            that the vocabulary lacks, or what is taken of it fits into one window.
    """
    substituted = noise_kind == "substitution"
    check_kinds("noise_kind", [noise_kind])
    check_levels("level", [level], probabilities=substituted)
    for name, count in (("draws", draws), ("most_tokens", most_tokens)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, expected an integer >= 1")
    check_seed(seed)
    tokens, name = text_tokens(run, text)
    scorer = Scorer(run.network, run.vocabulary, tokens, most_tokens=most_tokens)
    reported = scorer.reported
    if len(reported) < 2:
        raise ValueError(
            f"{name}: {min(len(tokens), most_tokens)} tokens in {len(reported)} window: expected "
            f"at least 2 windows of {run.network.block} tokens, the block of the model; "
            + ("raise most_tokens" if most_tokens < len(tokens) else "give a longer text")
        )
    prior = usual_prior(run, progress=progress)
    unit = 1.0 if substituted else scorer.embedding_rms(run.parameters)
    frequencies = training_frequencies(run) if substituted else None
    disturbed = perturbation(noise_kind, level * unit, frequencies=frequencies)
    if noise_kind.startswith("ascent"):
        draws = 1
    chosen = list(stages(run, prior))
    with progress_bar(
        "sensitivity", total=draws + len(chosen) + 1, unit="part", visible=progress
    ) as bar:
        clean, noisy = scorer.losses(run.parameters), np.zeros(reported.shape)
        for number in range(draws):
            key = jax.random.fold_in(jax.random.key(seed), number)
            noisy += scorer.losses(run.parameters, disturbed, rng_key=key) / draws
            bar.update(1)
        margins = []
        for stage in chosen:
            margins.append(reported_margins(run, stage, scorer.inputs, reported))
            bar.update(1)
        window, position = np.nonzero(reported)
        symbols = scorer.inputs[reported]
        comparisons = compare_with_margins(
            clean[reported], noisy[reported], margins, symbols, window, position, seed=seed
        )
        bar.update(1)
    strings = {symbol: run.vocabulary.display([symbol])[0] for symbol in np.unique(symbols)}
    rows = zip(scorer.inputs, reported, strict=True)
    shown = [run.vocabulary.display(row[kept]) for row, kept in rows]
    return Sensitivity(
        name=name,
        kind=noise_kind,
        level=level,
        index=scorer.starts[window] + position,
        tokens=list(itertools.chain.from_iterable(shown)),
        window=window,
        position=position,
        loss=clean[reported],
        noisy_loss=noisy[reported],
        stages=tuple(margins),
        comparisons=tuple(comparisons),
        characters=tuple(
            character
            for stage in margins
            for character in support_characters(stage, symbols, position, strings)
        ),
        post_hoc_converged=prior is None or prior.converged,
    )


def tables(found: Sensitivity) -> dict[str, tuple[Sequence[str], list[tuple]]]:
    """Return columns and rows by table: tokens, comparisons, which symbols are support tokens."""
    columns = {
        "index": found.index,
        "token": found.tokens,
        "window": found.window,
        "position": found.position,
        "loss": found.loss,
        "noisy_loss": found.noisy_loss,
        **stage_columns(found.stages),
    }
    return {
        "sensitivity": (list(columns), list(zip(*columns.values(), strict=True))),
        "sensitivity_comparisons": (
            ["noise", "level", "stage", "statistic", "within", "estimate", "low", "high"],
            [
                (found.kind, found.level, each.stage, each.statistic, each.within, *each.estimate)
                for each in found.comparisons
            ],
        ),
        "support_tokens": (
            ["stage", "token", "support", "share", "share_low", "share_high", "positions", "base"],
            [
                (each.stage, each.token, each.support, *each.share, each.positions, each.base)
                for each in found.characters
            ],
        ),
    }


def write_tables(found: Sensitivity, folder: Path) -> list[Path]:
    """Write each of the tables as a CSV file."""
    return [
        write_table(folder / f"{name}.csv", columns, rows)
        for name, (columns, rows) in tables(found).items()
    ]
