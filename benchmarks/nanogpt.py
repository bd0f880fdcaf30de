"""Steps of `fit` against those of nanoGPT's train.py, the same network on two threads.

    git clone https://github.com/karpathy/nanoGPT && cd nanoGPT
    python data/shakespeare_char/prepare.py
    python benchmarks/nanogpt.py PATH_OF_NANOGPT [--python PYTHON_WITH_TORCH] [--rounds 9]

Four layers of width 128, four heads, block 64, batch 12, no dropout: nanoGPT's own example for a
CPU. Either takes STEPS steps a round, in turn; nanoGPT twice, the second as the control.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from harness import CONTROL, alternate, environment, ratio

from probattn.inference.config import RunConfig
from probattn.inference.fitting.svi import Trainer
from probattn.models import LanguageModelConfig, ObjectiveConfig

STEPS, WARM = 120, 20  # of a round, and those of them that are not counted
VOCABULARY = 65
MODEL = LanguageModelConfig(layers=4, heads=4, width=128, block=64)


def nanogpt(folder: Path, python: str) -> float:
    """Return mean seconds of a step of train.py, as it prints them."""
    options = {
        "device": "cpu",
        "compile": False,
        "eval_iters": 1,
        "eval_interval": 10**6,
        "log_interval": 1,
        "block_size": MODEL.block,
        "batch_size": 12,
        "n_layer": MODEL.layers,
        "n_head": MODEL.heads,
        "n_embd": MODEL.width,
        "max_iters": STEPS,
        "dropout": 0.0,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        [python, "train.py", "config/train_shakespeare_char.py", *flags],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    milliseconds = [float(found) for found in re.findall(r"time ([0-9.]+)ms", done.stdout)]
    return statistics.mean(milliseconds[WARM:]) / 1e3


def probattn(trainer: Trainer) -> float:
    """Return mean seconds of a step of `fit`, from the same start every time."""
    state, _ = jax.block_until_ready(trainer.advance(trainer.init(), 0, WARM))
    started = time.perf_counter()
    jax.block_until_ready(trainer.advance(state, WARM, STEPS))
    return (time.perf_counter() - started) / (STEPS - WARM)


parser = argparse.ArgumentParser(description="fit against nanoGPT's train.py")
parser.add_argument("folder", type=Path, help="of nanoGPT, its character data prepared")
parser.add_argument("--python", default=sys.executable, help="an interpreter that has torch")
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
options = parser.parse_args()

if not (options.folder / "data/shakespeare_char/train.bin").exists():
    sys.exit(f"{options.folder}: expected nanoGPT, with the data that its prepare.py makes")
tokens = np.random.default_rng(0).integers(0, VOCABULARY, 1_000_000, dtype=np.int32)
runs = {"nanogpt": partial(nanogpt, options.folder, options.python)}
for name in ("ce", "margin"):
    config = RunConfig(model=MODEL, objective=ObjectiveConfig(name))
    runs[name] = partial(probattn, Trainer(config, jnp.asarray(tokens), VOCABULARY))
runs[CONTROL] = runs["nanogpt"]
seconds = alternate(runs, rounds=options.rounds)
torch = [options.python, "-c", "import torch; print(torch.__version__)"]
results = {
    "environment": environment(),
    "torch": subprocess.run(torch, capture_output=True, text=True, check=True).stdout.strip(),
    "rounds": options.rounds,
    "steps": {
        name: {"seconds": statistics.median(own), **ratio(own, seconds["nanogpt"])}
        for name, own in seconds.items()
    },
}
for name, figures in results["steps"].items():
    print(
        f"{'nanogpt again' if name == CONTROL else name:14s} {1e3 * figures['seconds']:7.2f} ms  "
        f"x {figures['ratio']:.3f} ({figures['ratio_low']:.3f} to {figures['ratio_high']:.3f})"
    )
path = options.out / "nanogpt.json"
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
print("wrote", path)
