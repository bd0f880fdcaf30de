"""What no text at all can do to the attention stages of a run."""

import math
from dataclasses import dataclass

import numpy as np

from probattn import table_certificate
from probattn.inference.evaluation.attention_stages import RunStage, stage_table, stages
from probattn.inference.runs.run import FittedRun, Run

MOST_NUMBERS = 2**26  # in the table of all symbols at all positions, of which copies are made


@dataclass(frozen=True)
class StageCertificate:
    """What is proved of one attention stage over all texts.

    Attributes:
        label: label of the stage.
        rho: of the table of all symbols at all positions, see `probattn.table_certificate`; below
            1 no text whatever folds the stage, whatever its last token attends to. NaN where the
            vocabulary and the block are too large for a table, for heads of a published model, and
            for those of all layers but the first, whose inputs depend on the whole context; all
            else is then empty.
        pair: the two symbols that fold it soonest.
        positions: where they stand.
        pair_rho: d^T A d / 4 of their difference d; above 1 the two fold every token that attends
            to both alike. NaN where the table was too large to look at all pairs.
    """

    label: str
    rho: float
    pair: tuple[str, str]
    positions: tuple[int, int]
    pair_rho: float


def trained_certificate(run: FittedRun) -> float | None:
    """Return rho of the stage that objective margin or full trains, over all texts.

    None for other objectives, where the barrier is on the heads of the first layer, and where the
    vocabulary and the block are too large for a table of what the stage may see; and for a model
    that was imported.
    """
    if not isinstance(run, Run):
        return None
    objective = run.config.objective
    if not (objective.has_barrier and objective.trains_attention_prior):
        return None
    rho = stage_certificate(run, next(stages(run, None))).rho
    return None if math.isnan(rho) else rho


def stage_certificate(run: FittedRun, stage: RunStage) -> StageCertificate:
    """Bound the certificate of every context that a text can make for a stage."""
    network = run.network
    positions = network.block if network.adds_positions else 1
    numbers = run.vocabulary.size * positions * network.config.width
    if stage.head is not None or stage.layer or numbers > MOST_NUMBERS:
        return StageCertificate(stage.label, math.nan, ("", ""), (0, 0), math.nan)
    table = stage_table(run, stage)
    if positions > 1:
        table = table[:, :-1]  # a window's last token is in no past
    symbols, length, width = table.shape
    found = table_certificate(
        table.reshape(-1, width),
        stage.w_query,
        stage.w_key,
        bound=stage.bound,
        position=np.tile(np.arange(length), symbols) if positions > 1 else None,
    )
    rows = [int(row) for row in found.pair]
    first, second = run.vocabulary.display(np.array([row // length for row in rows], np.int32))
    return StageCertificate(
        label=stage.label,
        rho=float(found.rho),
        pair=(first, second),
        positions=(rows[0] % length, rows[1] % length),
        pair_rho=float(found.pair_rho),
    )
