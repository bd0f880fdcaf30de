"""What draws and exports posteriors, in a process that forbids promotion.

The commands of README run so too, in test_readme.py, and the lower floors in tests/models.
"""

import os
import subprocess
import sys

import pytest

from tests.support.tiny_run import BLOCK, HEADS, RANK, WIDTH, tiny_text

QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
STRICT = {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}

PROGRAM = """
import sys

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from probattn.inference import SampleConfig, load_posterior, load_run, sample, to_datatree
from probattn.inference.cli import main

folder, *sizes = sys.argv[1:]
data = ["--data", f"{folder}/corpus.txt"]
steps = ["--fit.steps", "20", "--fit.warmup", "5", "--fit.batch", "2", *sizes]
draws = ["--sample.chains", "2", "--sample.warmup", "5", "--sample.draws", "5"]
latent = ["--latent.width", "2", "--latent.sequences", "2", "--latent.length", "4"]
assert main(["fit", *data, *steps, "--guide", "mean_field", "--out", f"{folder}/guide"]) == 0
assert main(["sample", *data, *latent, *draws, "--out", f"{folder}/draws"]) == 0
guide, draws = (load_run(f"{folder}/{name}") for name in ("guide", "draws"))
to_datatree(guide, draws=4)
to_datatree(load_posterior(draws), log_likelihood=True)

def model():
    x = numpyro.sample("x", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

sample(model, config=SampleConfig(chains=2, warmup=5, draws=5))
"""


@pytest.mark.nightly
def test_posteriors_are_drawn_and_exported_where_promotion_is_forbidden(tmp_path):
    (tmp_path / "corpus.txt").write_text(tiny_text(), encoding="utf-8")
    sizes = {"layers": 1, "heads": HEADS, "width": WIDTH, "block": BLOCK, "prior-rank": RANK}
    options = [part for name, size in sizes.items() for part in (f"--model.{name}", str(size))]
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *options],
        env=os.environ | STRICT | QUICK,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
