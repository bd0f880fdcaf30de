"""One model: fitted, then measured on text that is held out. Nothing is done twice."""

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tuning_plan import BITS, NOISE, Task

from probattn.inference import fit, load_run
from probattn.inference.evaluation.attention_stages import stage_margins, stages
from probattn.inference.evaluation.perturbations import Gaussian
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.evaluation.texts import text_tokens
from probattn.inference.runs.files import write_text
from probattn.inference.runs.imported import DecoderRun
from probattn.models.decoder.rounding import round_weights

_FIRST = 2  # first position that has a margin


def measured(task: Task) -> dict[str, Any] | None:
    """Return what was measured of a task, None if it was not, or in another way."""
    path = task.out / "measured.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["results"] if found["plan"] == _plan(task) else None


def work(task: Task) -> None:
    """Make the model, from where its fit was interrupted, and measure it.

    Raises:
        ValueError: see `fit`.
    """
    started = time.process_time()
    run = load_run(task.base) if task.config is None else _fitted(task)
    fitted = time.process_time()
    results = measure(task, run)
    results |= {"fit_seconds": fitted - started, "seconds": time.process_time() - started}
    text = json.dumps({"plan": _plan(task), "results": results}, indent=1)
    write_text(task.out / "measured.json", text + "\n")


def _plan(task: Task) -> dict[str, Any]:
    """Return what results depend on, as JSON gives it back; not where texts and runs lie."""
    plan = dataclasses.asdict(task)
    for name in ("base", "held_out", "other", "out"):
        del plan[name]
    if task.config is not None:
        del plan["config"]["data"], plan["config"]["base"]
    return json.loads(json.dumps(plan | {"noise": NOISE, "bits": BITS}))


def _fitted(task: Task) -> DecoderRun:
    folder = task.out / "fit"
    resume = (folder / "config.toml").exists()
    return fit(task.config, folder, base=task.base, resume=resume).run


def measure(task: Task, run: DecoderRun) -> dict[str, float]:
    """Measure bits per character, clean and disturbed, and the margins of the first layer's heads.

    Returns:
        By name: `bpc`, `noise_LEVEL` and `rounded` of the held-out text, `other` of the other one;
        `smallest` and `median` margin of all heads and tokens, and the share that is `folded`.
    """
    tokens, _ = text_tokens(run, task.held_out)
    scorer = _scorer(run, tokens, task.sizes.tokens)
    parameters: Mapping[str, Any] = run.parameters
    rms, key = scorer.embedding_rms(parameters), jax.random.key(0)
    found = {"bpc": scorer.score(parameters).bpc}
    for level in NOISE:
        disturbed = scorer.score(parameters, Gaussian(level * rms), rng_key=key)
        found[f"noise_{level:g}"] = disturbed.bpc
    found["rounded"] = scorer.score(round_weights(parameters, BITS)).bpc
    other, _ = text_tokens(run, task.other)
    found["other"] = _scorer(run, other, task.sizes.tokens).score(parameters).bpc
    inputs = _scorer(run, tokens, task.sizes.margin_tokens).inputs
    margins = [stage_margins(run, stage, inputs).margin[:, _FIRST:] for stage in stages(run, None)]
    return found | {
        "smallest": float(np.min(margins)),
        "median": float(np.median(margins)),
        "folded": float(np.mean(~(np.array(margins) > 0))),
    }


def _scorer(run: DecoderRun, tokens: np.ndarray, most: int) -> Scorer:
    return Scorer(run.network, run.vocabulary, tokens, most_tokens=most)
