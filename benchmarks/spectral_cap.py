"""What `model.spectral_cap` costs: the demonstration's network with and without it.

Fits objectives ce and margin with and without a cap, from several seeds, and measures each run on
the validation text. The results are printed, and written after every run. A run whose result the
file holds already is not fitted again.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from probattn.blocks.promotion import default_promotion
from probattn.inference import fit
from probattn.inference.cli.demo import DEMO_CONFIG
from probattn.inference.evaluation.attention_stages import stage_margins, stages
from probattn.inference.evaluation.evaluate import MARGIN_TOKENS
from probattn.inference.evaluation.perturbations import perturbation
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.evaluation.stage_certificates import stage_certificate
from probattn.inference.evaluation.texts import text_tokens
from probattn.inference.runs.run import Run
from probattn.models import ObjectiveConfig
from probattn.models.objective import ObjectiveName
from probattn.text.batches import windows

CAP = 0.9
LEVEL = 0.5  # of the noise, in units of the embeddings' root mean square
OBJECTIVES: tuple[ObjectiveName, ...] = ("ce", "margin")


def measured(objective: ObjectiveName, cap: float | None, seed: int, steps: int) -> dict[str, Any]:
    """Fit one run and measure it."""
    config = dataclasses.replace(
        DEMO_CONFIG,
        model=dataclasses.replace(DEMO_CONFIG.model, spectral_cap=cap),
        objective=ObjectiveConfig(objective),
        fit=dataclasses.replace(DEMO_CONFIG.fit, seed=seed, steps=steps),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = fit(config, Path(folder) / "run").run
        given = {"objective": objective, "cap": cap, "seed": seed, "steps": steps}
        return given | _of_run(run)


@default_promotion()
def _of_run(run: Run) -> dict[str, Any]:
    tokens, _ = text_tokens(run, None)
    scorer = Scorer(run.network, run.vocabulary, tokens)
    noise = perturbation("gaussian", LEVEL * scorer.embedding_rms(run.parameters))
    clean, noisy = (
        scorer.score(run.parameters, *given, rng_key=jax.random.key(0)).bpc
        for given in ((), (noise,))
    )
    inputs = windows(len(tokens), block=run.network.block).spread(MARGIN_TOKENS).take(tokens)
    found = {}
    for stage in stages(run, None):
        margins = stage_margins(run, stage, inputs)
        found[stage.label] = {
            "rho": stage_certificate(run, stage).rho,
            "certified": float(np.mean(margins.certificate[:, 2:] < 1)),
            "infeasible": float(np.mean(margins.infeasible[:, 2:])),
        }
    fastest = max(row["tokens_per_s"] for row in run.metrics())
    return {
        "bpc": clean,
        "degradation": noisy / clean,
        "tokens_per_s": fastest,
        "stages": found,
    }


def main() -> None:
    """Fit and measure all runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="JSON file for the results")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    parser.add_argument("--steps", type=int, default=DEMO_CONFIG.fit.steps, help="of each fit")
    options = parser.parse_args()
    there = options.out.exists()
    found = json.loads(options.out.read_text(encoding="utf-8")) if there else []
    known = {(each["objective"], each["cap"], each["seed"], each["steps"]) for each in found}
    for seed in range(options.seeds):
        for objective in OBJECTIVES:
            for cap in (None, CAP):
                if (objective, cap, seed, options.steps) in known:
                    continue
                found.append(measured(objective, cap, seed, options.steps))
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(json.dumps(found[-1]), flush=True)


if __name__ == "__main__":
    main()
