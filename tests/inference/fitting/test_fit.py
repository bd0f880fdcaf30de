"""What a whole fit leaves."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from probattn import stability_margin
from probattn.inference import fit, load_run
from probattn.inference.config_files import format_config
from probattn.inference.evaluation.attention_stages import stages
from probattn.inference.evaluation.stage_certificates import stage_certificate
from probattn.inference.fitting.optimizers import default_optimizer
from tests.support.tiny_run import (
    BLOCK,
    START,
    WIDTH,
    all_logits,
    embedded,
    log_softmax,
    tiny_text,
)
from tests.support.whole_fit import (
    REPORTS,
    state_of,
    with_data,
    with_fit,
)


def test_the_loss_falls(whole):
    losses = [row["loss"] for row in whole.run.metrics()]
    assert losses[0] > losses[1] + 0.1
    assert losses[1] > losses[2]


def test_it_starts_a_third_as_wide_as_the_prior(whole):
    values = np.concatenate([(whole.start[n] / s).ravel() for n, s in START.items()])
    assert values.std() == pytest.approx(1, abs=4 / math.sqrt(2 * values.size))
    assert values.mean() == pytest.approx(0, abs=4 / math.sqrt(values.size))
    assert {value.dtype for value in whole.start.values()} == {np.dtype("float64")}


def test_the_lines_of_metrics(whole):
    rows = whole.run.metrics()
    assert [row["step"] for row in rows] == REPORTS
    for row in rows:
        assert list(row) == [
            "step",
            "cross_entropy",
            "bpc",
            "validation_cross_entropy",
            "validation_bpc",
            "loss",
            "tokens_per_s",
            "min_margin",
            "min_margin_kind",
            "mean_margin",
            "mean_log_det",
            "infeasible_fraction",
            "coupling_eigenvalue_min",
            "coupling_eigenvalue_max",
            "rejected_steps",
            "embedding_rms",
        ]
        assert row["tokens_per_s"] > 0
        assert (row["infeasible_fraction"], row["rejected_steps"]) == (0, 0)
        assert row["min_margin_kind"] == "reduced, separate"
    assert whole.result.metrics == rows


def cross_entropy(run, text):
    """Of every token but the first, by a network of its own, in windows without overlap."""
    tokens = run.vocabulary.encode(text)
    losses = []
    for start in range(0, len(tokens) - 1, BLOCK):
        end = min(start + BLOCK, len(tokens) - 1)
        first = end - BLOCK  # the last window is moved back to end with the text
        predicted = log_softmax(all_logits(run, tokens[first:end]))
        losses += [-predicted[i - first, tokens[i + 1]] for i in range(start, end)]
    return np.mean(losses)


def test_the_last_line_describes_the_last_parameters(whole):
    state = state_of(whole.run, whole.trainer)
    prefix, suffix = "svi.optim_state.1.0.", "_auto_loc"
    parameters = {
        name.removeprefix(prefix).removesuffix(suffix): value
        for name, value in state.items()
        if name.startswith(prefix)
    }
    run = SimpleNamespace(parameters=parameters, vocabulary=whole.run.vocabulary)
    row = whole.run.metrics()[-1]
    for prefix, text in (("", tiny_text()[:3600]), ("validation_", tiny_text()[3600:])):
        expected = cross_entropy(run, text)
        assert row[f"{prefix}cross_entropy"] == pytest.approx(expected, rel=1e-12)
        assert row[f"{prefix}bpc"] == pytest.approx(expected / math.log(2), rel=1e-12)
    tokens = run.vocabulary.encode(tiny_text()[: 16 * BLOCK]).reshape(16, BLOCK)
    margins = jax.jit(partial(stability_margin, kind="reduced"))(
        embedded(run, tokens), parameters["w_query"], parameters["w_key"]
    )
    assert row["min_margin"] == pytest.approx(float(margins[:, 2:].min()), rel=1e-12)
    inputs = run.vocabulary.encode(tiny_text()[:3599])
    rest = np.arange(3599 // BLOCK * BLOCK, 3599)
    x = [embedded(run, inputs[: rest[0]].reshape(-1, BLOCK)).reshape(-1, WIDTH)]
    x.append(embedded(run, inputs[-BLOCK:])[-len(rest) :])
    rms = np.sqrt(np.mean(np.concatenate(x) ** 2))
    assert row["embedding_rms"] == pytest.approx(rms, rel=1e-12)


def test_the_best_parameters_are_those_of_the_best_validation(whole):
    rows = whole.run.metrics()
    best = min(rows, key=lambda row: row["validation_cross_entropy"])
    expected = cross_entropy(whole.run, tiny_text()[3600:])
    assert whole.run.step == best["step"]
    assert best["validation_cross_entropy"] == pytest.approx(expected, rel=1e-12)
    assert whole.result.validation_cross_entropy == pytest.approx(expected, rel=1e-12)
    assert whole.result.validation_bpc == pytest.approx(expected / math.log(2), rel=1e-12)
    parameters = sum(value.size for value in whole.run.parameters.values())
    assert whole.run.summary()["fit"] == {
        "inference": "map",
        "steps": 200,
        "best_step": best["step"],
        "validation_cross_entropy": whole.result.validation_cross_entropy,
        "validation_bpc": whole.result.validation_bpc,
        "validation_tokens": 399,
        "rejected_steps": 0,
        "table_certificate": stage_certificate(whole.run, next(stages(whole.run, None))).rho,
        "parameters": parameters,
    }


@pytest.mark.slow
def test_so_many_tokens_are_scored_at_the_end(config, tmp_path):
    result = fit(with_fit(config, steps=2, warmup=0, evaluation_tokens=BLOCK + 1), tmp_path / "run")
    expected = cross_entropy(result.run, tiny_text()[3600 : 3600 + BLOCK + 1])
    assert result.validation_cross_entropy == pytest.approx(expected, rel=1e-12)
    assert result.run.summary()["fit"]["validation_tokens"] == BLOCK


def test_the_run_says_what_it_was_fitted_on(whole, config):
    run = load_run(whole.run.path)
    assert run.config == config
    assert run.data["train_characters"] == 3600
    assert run.data["validation_characters"] == 400
    assert run.vocabulary.symbols == tuple(sorted(set(tiny_text())))
    assert whole.run.latest.step == 200


SINGLE_PRECISION = """
import sys
import numpy as np
from probattn.inference import fit, read_config
from probattn.inference.fitting.svi import Trainer

config, folder = read_config(sys.argv[1]), sys.argv[2]
whole = fit(config, folder + "/whole")
advance = Trainer.advance

def stopping_advance(self, state, step, stop):
    if step >= 130:
        raise KeyboardInterrupt
    return advance(self, state, step, stop)

Trainer.advance = stopping_advance
try:
    fit(config, folder + "/again")
except KeyboardInterrupt:
    Trainer.advance = advance
again = fit(config, folder + "/again", resume=True)
for name, value in whole.run.parameters.items():
    assert value.dtype == np.float32, name
    np.testing.assert_array_equal(again.run.parameters[name], value)
timed = [dict(row, tokens_per_s=None) for row in whole.metrics]
assert [dict(row, tokens_per_s=None) for row in again.metrics] == timed
assert timed[-1]["loss"] < timed[0]["loss"] - 0.1
print("done")
"""


@pytest.mark.slow
def test_a_fit_in_single_precision_which_is_the_default_outside_of_these_tests(config, tmp_path):
    (tmp_path / "config.toml").write_text(format_config(config), "utf-8")
    command = [sys.executable, "-W", "error", "-c", SINGLE_PRECISION, tmp_path / "config.toml"]
    environment = {
        **os.environ,
        "JAX_ENABLE_X64": "0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    child = subprocess.run(
        [*command, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stdout) == (0, "done\n"), child.stderr


@pytest.mark.slow
def test_a_custom_optimizer_is_used_and_the_best_of_its_steps_kept(whole, config, tmp_path):
    """It is the default one until step 160, and climbs from there."""
    default = default_optimizer(config.fit)

    def update(gradient, state, parameters):
        step, changed = default.update(gradient, state[0], parameters)
        sign = jnp.where(state[0][0].count < 160, 1.0, -3.0)
        return jax.tree.map(lambda value: sign * value, step), (changed, state[1])

    # As a best loss so far, which starts from infinity.
    optimizer = optax.GradientTransformation(
        lambda p: (default.init(p), jnp.array(jnp.inf)), update
    )
    run = fit(config, tmp_path / "run", optimizer=optimizer).run
    rows = run.metrics()
    for row, expected in zip(rows[:2], whole.run.metrics(), strict=False):
        for name in ("loss", "cross_entropy", "embedding_rms"):
            assert row[name] == pytest.approx(expected[name], rel=1e-9)  # other compiled code
    assert rows[2]["validation_cross_entropy"] > rows[1]["validation_cross_entropy"] + 0.1
    assert (run.step, run.latest.step) == (160, 200)
    best = cross_entropy(run, tiny_text()[3600:])
    assert rows[1]["validation_cross_entropy"] == pytest.approx(best, rel=1e-12)
    assert run.summary()["fit"]["best_step"] == 160


@pytest.mark.slow
def test_minibatches_of_one_repeated_token(config, tmp_path):
    """No spread in any context: every determinant is 1, and the network learns the one token."""
    (tmp_path / "text").write_text(" " * 3600 + tiny_text()[:400], encoding="utf-8")
    run = fit(with_data(config, source=str(tmp_path / "text")), tmp_path / "run").run
    assert run.vocabulary.symbols == tuple(sorted(set(tiny_text())))
    rows = run.metrics()
    assert rows[-1]["cross_entropy"] < 0.1 < rows[-1]["validation_cross_entropy"]
    for row in rows:
        assert (row["rejected_steps"], row["infeasible_fraction"]) == (0, 0)
    assert all(np.isfinite(value).all() for value in run.parameters.values())


def test_no_file_of_a_run_holds_what_json_lacks(whole):
    constants = []  # NaN, Infinity and -Infinity, as Python writes and reads them
    for name in ("metrics.jsonl", "summary.json", "data.json"):
        text = (whole.run.path / name).read_text("utf-8")
        for part in text.splitlines() if name.endswith("l") else [text]:
            assert json.loads(part, parse_constant=constants.append)
    assert constants == []
