"""Everything that one has to see on a GPU, in one command of at most eight minutes.

    python benchmarks/gpu.py --out gpu.json [--tiny] [--limit 480]

It checks the mathematics and a step against double precision on the CPU, fits and resumes a model,
and measures what the barrier costs at the size of GPT-2, and chains of NUTS. Every row is kept when
it is done, and none begins after the limit. `--tiny` runs all of it in small, on any device.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from harness import CONTROL, environment, ratios, timed_in_turn
from numpyro.infer.util import log_density

import probattn as pa
from probattn.inference import fit
from probattn.inference.config import FitConfig, RunConfig
from probattn.inference.config_sampling import SampleConfig
from probattn.inference.fitting.svi import Trainer
from probattn.inference.runs.run import Run
from probattn.inference.sampling.chains import Chains
from probattn.models import (
    LanguageModelConfig,
    LatentEmbeddingsConfig,
    ObjectiveConfig,
    language_model,
    latent_embeddings,
)
from probattn.models.language import parameter_shapes
from probattn.text.corpora import DataConfig

PEAK = 989e12  # operations in a second of a H200 in bfloat16, without sparsity
VOCABULARY = 50_257
# Sizes: (whole, tiny).
SMALL = (
    LanguageModelConfig(layers=2, heads=2, width=32, block=32, prior_rank=8),
    LanguageModelConfig(layers=1, heads=2, width=8, block=8, prior_rank=2),
)
MODEL = (
    LanguageModelConfig(layers=12, heads=12, width=768, block=1024),
    LanguageModelConfig(layers=1, heads=2, width=16, block=16),
)
RANKS = (32, 64), (4, 8)
BATCH, STEPS, ROUNDS = (32, 2), (10, 2), (5, 2)
LATENT = (
    LatentEmbeddingsConfig(width=4, sequences=16, length=16),
    LatentEmbeddingsConfig(width=2, sequences=2, length=4),
)
CHAINS, ITERATIONS = (64, 2), (60, 4)
CPU_CHAINS = 4, 2


def relative(found: Any, true: Any) -> float:
    """Return the largest error over the largest number."""
    found, true = np.asarray(found, np.float64), np.asarray(true, np.float64)
    return float(np.max(np.abs(found - true)) / np.max(np.abs(true)))


def in_double(function: Callable, *arguments: Any) -> Any:
    """Evaluate a function in double precision on the CPU."""

    def widened(leaf: Any) -> Any:
        return np.asarray(leaf, np.float64) if np.asarray(leaf).dtype == np.float32 else leaf

    wide = jax.tree.map(widened, arguments)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, jax.jit(function)(*wide))


def check(errors: dict[str, float], tolerance: float) -> dict[str, Any]:
    """Return errors beside what is allowed, and whether they are within."""
    return {
        "errors": errors,
        "tolerance": tolerance,
        "agrees": all(error <= tolerance for error in errors.values()),  # False too where NaN
    }


def mathematics(tiny: bool) -> dict[str, Any]:
    """Compare determinants, their gradient and margins with those in double precision.

    Sizes and tolerance are those of the tests, 1e-4 of the largest number; rounding to TF32 fails.
    """
    length, width, rank = (16, 8, 4) if tiny else (64, 64, 32)
    rng = np.random.default_rng(90)
    x = rng.normal(size=(4, length, width)).astype(np.float32)
    w_query, w_key = (rng.normal(size=(2, width, rank)) / math.sqrt(width)).astype(np.float32)

    def total(*inputs: Any) -> Any:
        return jnp.sum(pa.log_det(*inputs, summed=True)[1])

    functions = {
        "log_det": lambda *inputs: pa.log_det(*inputs)[1],
        "gradient": lambda *inputs: jnp.concatenate(
            [part.ravel() for part in jax.grad(total, argnums=(0, 1, 2))(*inputs)]
        ),
        "margin": pa.stability_margin,
        "reduced_margin": partial(pa.stability_margin, kind="reduced"),
    }
    arguments = x, w_query, w_key
    errors = {
        name: relative(jax.jit(function)(*arguments), in_double(function, *arguments))
        for name, function in functions.items()
    }
    crossed = jax.jit(pa.infeasible)(x, w_query, 3 * w_key)
    differ = np.mean(np.asarray(crossed) != in_double(pa.infeasible, x, w_query, 3 * w_key))
    return check(errors | {"share_of_infeasible_that_differ": float(differ)}, 1e-4)


def one_step(tiny: bool) -> dict[str, Any]:
    """Compare what a step minimises, and its gradient, with those in double precision."""
    model, objective = SMALL[tiny], ObjectiveConfig("full")
    rng = np.random.default_rng(0)
    parameters = {
        name: (("norm" in name) + rng.normal(size=leaf.shape) / 8).astype(np.float32)
        for name, leaf in parameter_shapes(65, model, objective).items()
    }
    inputs, targets = rng.integers(0, 65, (2, 2 if tiny else 12, model.block), np.int32)

    def loss(parameters: Any) -> Any:
        options = {"vocabulary_size": 65, "config": model, "objective": objective}
        return -log_density(language_model, (inputs, targets), options, parameters)[0]

    function = jax.value_and_grad(loss)
    with jax.default_matmul_precision("float32"):
        found = jax.jit(function)(parameters)
    true = in_double(function, parameters)
    errors = {"loss": relative(found[0], true[0])}
    errors |= {name: relative(found[1][name], true[1][name]) for name in parameters}
    return check(errors, 1e-3)


def text_file(folder: Path) -> str:
    """Write a text that can be learnt, the same on every machine."""
    rng = np.random.default_rng(0)
    words = ("the token", "of a", "margin", "and so on", "in its past", "with a key", "\n")
    path = folder / "text.txt"
    path.write_text(" ".join(rng.choice(words, 4000)), encoding="utf-8")
    return str(path)


def fitted(tiny: bool, folder: Path) -> dict[str, Any]:
    """Fit a model, and again from what there was at its first report; return the losses."""
    steps = 20 if tiny else 300
    schedule = FitConfig(
        steps=steps, warmup=5, batch=8, eval_every=steps // 2, checkpoint_every=steps // 4
    )
    config = RunConfig(
        DataConfig(text_file(folder)), SMALL[tiny], ObjectiveConfig("margin"), schedule
    )
    append, half = Run.append_metrics, folder / "half"

    def copying(run: Run, line: Any) -> None:
        append(run, line)
        if not half.exists():
            shutil.copytree(run.path, half)

    with mock.patch.object(Run, "append_metrics", copying):
        whole = fit(config, folder / "whole").run
    resumed = fit(config, half, resume=True).run
    losses, again = ([row["cross_entropy"] for row in run.metrics()] for run in (whole, resumed))
    return {
        "cross_entropies": losses,
        "resumed_differs_by": float(np.max(np.abs(np.subtract(losses, again)))),
    }


def chains(tiny: bool, *, count: int, method: str) -> dict[str, Any]:
    """Measure the leapfrog steps that chains take in a second, once all is compiled."""
    latent = LATENT[tiny]
    tokens = np.random.default_rng(0).integers(0, 8, (latent.sequences, latent.length))
    model = partial(latent_embeddings, vocabulary_size=8, config=latent)
    iterations = ITERATIONS[tiny]
    config = SampleConfig(
        chains=count, warmup=iterations, draws=iterations, chain_method=method, max_tree_depth=6
    )
    with jax.enable_x64(True):
        sampler = Chains(model, ((jnp.asarray(tokens),), {}), config, {})
        started = time.perf_counter()
        parts = [*sampler.advance(0, [2 * iterations])]
        seconds = time.perf_counter() - started
    leapfrogs = sum(int(part.statistics["n_steps"].sum()) for part in parts)
    return {
        "chains": count,
        "method": method,
        "seconds": seconds,
        "leapfrog_steps": leapfrogs,
        "leapfrog_steps_per_second": leapfrogs / seconds,
        "divergences": sum(int(part.statistics["diverging"].sum()) for part in parts),
    }


def on_the_cpu(part: str, tiny: bool) -> subprocess.Popen:
    """Start what is compared with, in a process of its own that sees the CPU alone."""
    command = [sys.executable, __file__, "--cpu", part, *(["--tiny"] if tiny else [])]
    return subprocess.Popen(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True
    )


def cpu_part(part: str, tiny: bool) -> dict[str, Any]:
    """Do what `on_the_cpu` starts."""
    if part == "chains":
        return chains(tiny, count=CPU_CHAINS[tiny], method="parallel")
    with tempfile.TemporaryDirectory() as folder:
        return fitted(tiny, Path(folder))


def result_of(process: subprocess.Popen) -> dict[str, Any]:
    """Wait for a process and return what it printed last."""
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the process on the CPU ended with status {process.returncode}")
    return json.loads(output.splitlines()[-1])


def fit_and_resume(tiny: bool, process: subprocess.Popen) -> dict[str, Any]:
    """Fit and resume on the device; compare the losses with those of the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        found = fitted(tiny, Path(folder))
    true = result_of(process)
    losses = [result["cross_entropies"] for result in (found, true)]
    difference = float(np.max(np.abs(np.subtract(*losses))))
    # Rounding grows over hundreds of steps: nats, of losses of one to three.
    agrees = max(difference, found["resumed_differs_by"]) <= 0.05
    return found | {"on_the_cpu": true, "difference": difference, "agrees": agrees}


def training_steps(tiny: bool) -> dict[str, Any]:
    """Measure steps of ce and of margin at two ranks in turn: time, rate, utilisation, memory."""
    vocabulary, steps, batch = 101 if tiny else VOCABULARY, STEPS[tiny], BATCH[tiny]
    model = MODEL[tiny]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, vocabulary, 10**6, np.int32))
    schedule = FitConfig(batch=batch, precision="bfloat16", learning_rate=3e-4)
    ce = RunConfig(model=model, objective=ObjectiveConfig("ce"), fit=schedule)
    configs = {"ce": ce} | {
        f"margin, r = {rank}": replace(
            ce, model=replace(model, prior_rank=rank), objective=ObjectiveConfig("margin")
        )
        for rank in RANKS[tiny]
    }
    trainers = {name: Trainer(config, tokens, vocabulary) for name, config in configs.items()}
    states = {name: trainer.init() for name, trainer in trainers.items()}

    def run(name: str) -> Any:
        # What moves to the host inside a call would raise here.
        with jax.transfer_guard_device_to_host("disallow"):
            states[name], progress = trainers[name].advance(states[name], 0, steps)
        return progress

    timed = ratios(timed_in_turn({n: partial(run, n) for n in configs}, rounds=ROUNDS[tiny]))
    rows = {}
    for name, figures in timed.items():
        trainer = trainers["ce" if name == CONTROL else name]
        compiled: Any = trainer._advance
        seconds, memory = figures["seconds"] / steps, compiled.memory_analysis()
        each = operations_per_token(model, vocabulary)
        rows[name] = figures | {
            "seconds_per_step": seconds,
            "tokens_per_second": batch * model.block / seconds,
            "utilisation": batch * model.block * each / seconds / PEAK,
            "bytes_of_temporaries": memory.temp_size_in_bytes,
            "bytes_of_arguments": memory.argument_size_in_bytes,
            "callbacks": compiled.as_text().count("callback"),
        }
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"rows": rows, "peak_bytes_of_all": stats.get("peak_bytes_in_use")}


def operations_per_token(model: LanguageModelConfig, vocabulary: int) -> int:
    """Count what a step of ce must do: six for each weight of a product, and attention."""
    weights = 12 * model.layers * model.width**2 + vocabulary * model.width
    return 6 * weights + 12 * model.layers * model.width * model.block


def nuts(tiny: bool, process: subprocess.Popen) -> dict[str, Any]:
    """Compare chains that advance together on the device with chains on the CPU's threads."""
    found = chains(tiny, count=CHAINS[tiny], method="vectorized")
    true = result_of(process)
    rate = "leapfrog_steps_per_second"
    return {"device": found, "cpu": true, "ratio": found[rate] / true[rate]}


def main() -> None:
    """Run the rows in order, and write the file after each."""
    parser = argparse.ArgumentParser(description="checks and measurements on one GPU")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--tiny", action="store_true", help="everything in small, on any device")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds until the last row")
    parser.add_argument("--cpu", choices=["chains", "fitted"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    tiny = options.tiny
    if options.cpu:
        print(json.dumps(cpu_part(options.cpu, tiny)))
        return
    started = time.perf_counter()
    found: dict[str, Any] = {"environment": environment(), "tiny": tiny, "rows": {}}
    # Ended by a signal, it ends what it started too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    processes = {part: on_the_cpu(part, tiny) for part in ("fitted", "chains")}
    # What is most wanted comes first; the largest programs take a minute each to compile.
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "mathematics": partial(mathematics, tiny),
        "one_step": partial(one_step, tiny),
        "training_steps": partial(training_steps, tiny),
        "fit_and_resume": partial(fit_and_resume, tiny, processes["fitted"]),
        "nuts": partial(nuts, tiny, processes["chains"]),
    }
    try:
        for name, row in parts.items():
            begun = time.perf_counter()
            if begun - started > options.limit:
                found["rows"][name] = {"left_out": f"after {options.limit:g} seconds"}
            else:
                try:
                    found["rows"][name] = row()
                except Exception as error:  # the other rows are wanted all the same
                    found["rows"][name] = {"error": f"{type(error).__name__}: {error}"}
                found["rows"][name]["seconds_of_row"] = time.perf_counter() - begun
            options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            print(name, json.dumps(found["rows"][name])[:2000], flush=True)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    rows = found["rows"].items()
    if bad := [name for name, row in rows if "error" in row or not row.get("agrees", True)]:
        sys.exit(f"failed, or does not agree: {', '.join(bad)}")


if __name__ == "__main__":
    main()
