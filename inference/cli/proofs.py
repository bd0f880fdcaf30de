"""What is proved of attention stages, and what is found where nothing is, on a terminal."""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool
from rich.console import Console
from rich.table import Table
from rich.text import Text

from probattn.inference.evaluation.folding_texts import FoldingText
from probattn.inference.evaluation.stage_certificates import StageCertificate
from probattn.inference.evaluation.token_margins import TextMargins


def print_proved(screen: Console, margins: TextMargins) -> None:
    """Print what is proved of every stage: at the tokens of a text, and for all texts."""
    radii = all(stage.radius is not None for stage in margins.stages)
    title = "proved; radius in RMS of the stage's input" if radii else "proved"
    table = Table(title=title, title_justify="left")
    columns = ("here", "radius, 5 %", "radius, median") if radii else ()
    for name in ("stage", "for every query", *columns):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    inner = margins.position >= 2
    for stage in margins.stages:
        row = [stage.label, _share(stage.certificate[inner] < 1)]
        if stage.radius is not None:
            radius = np.nan_to_num(stage.radius[inner], posinf=np.inf)  # unknown: nothing is proved
            quantiles = np.quantile(radius, [0.05, 0.5], method="lower")  # some may be infinite
            row += [_share(radius > 0), *(f"{value:.3f}" for value in quantiles)]
        table.add_row(*row)
    screen.print(table)
    known = [found for found in margins.certificates if not math.isnan(found.rho)]
    for found in known:
        screen.print(Text(_of_all_texts(found)), soft_wrap=True)
    if others := len(margins.certificates) - len(known):
        screen.print(
            f"{others} of {len(margins.certificates)} stages: it is not known whether some text "
            "folds them. Their symbols and positions are too many to look at all texts, their "
            "logits depend on more than W_Q and W_K, or they are not in the first layer.",
            soft_wrap=True,
        )


def print_folds(screen: Console, folds: Mapping[str, FoldingText | None]) -> None:
    """Print for each stage a text that folds it, or that none was found."""
    for label, fold in folds.items():
        line = f"{label}: no text that folds it was found"
        if fold is not None:
            line = f"{label}: the last token of {fold.text!r} folds it (margin {fold.margin:.3f})"
        screen.print(Text(line), soft_wrap=True)


def of_any_text(rho: float) -> str:
    """Say what the certificate of a stage's table proves."""
    return f"{'no text can' if rho < 1 else 'a text may'} fold it (rho = {rho:.2f})"


def _share(proved: Bool[np.ndarray, " N"]) -> str:
    return f"{100 * np.mean(proved):.1f} %"


def _of_all_texts(proved: StageCertificate) -> str:
    line = f"{proved.label}: {of_any_text(proved.rho)}"
    if proved.pair_rho > 1:
        first, second = proved.pair
        line += f", as {first!r} and {second!r} do with equal weights ({proved.pair_rho:.2f})"
    return line
