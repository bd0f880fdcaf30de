"""Posterior of latent embeddings, of data whose truth is known: SVI first, then NUTS, then ArviZ.

    python examples/posterior_simulated.py [--warmup 500] [--draws 2000] [--out runs/simulated]

Prints the true values beside the posterior by a mean-field guide and by NUTS, and leaves the draws
(posterior.nc) and a figure of the smallest margin in --out.
"""

import argparse
from functools import partial
from pathlib import Path

import arviz as az
import jax
import numpy as np
import optax
from numpyro.handlers import seed, trace
from numpyro.infer import SVI, Predictive, Trace_ELBO, init_to_sample
from numpyro.infer.autoguide import AutoNormal

from probattn.inference import SampleConfig, sample, to_datatree
from probattn.inference.figures.posterior import smallest_margin
from probattn.inference.figures.style import save_figure
from probattn.models import LatentEmbeddingsConfig, latent_embeddings

parser = argparse.ArgumentParser(description="posterior of simulated latent embeddings")
parser.add_argument("--sequences", type=int, default=16)
parser.add_argument("--length", type=int, default=32)
parser.add_argument("--steps", type=int, default=3000)
parser.add_argument("--warmup", type=int, default=500)
parser.add_argument("--draws", type=int, default=2000)
parser.add_argument("--out", type=Path, default=Path("runs/simulated"))
options = parser.parse_args()

# The model: c^2 times the largest eigenvalue of (A + A^T)/2 is below 1, so every conditional is a
# density.
config = LatentEmbeddingsConfig(
    width=3, coupling="bounded", bound=1.0, sequences=options.sequences, length=options.length
)
model = partial(latent_embeddings, vocabulary_size=12, config=config)

# Data from the model itself.
with jax.enable_x64(True):
    sites = trace(seed(model, 7)).get_trace()
    truth = {name: np.asarray(site["value"]) for name, site in sites.items() if "value" in site}
tokens = truth["tokens"]

# A mean-field guide by NumPyro's own SVI.
guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.1)
svi = SVI(model, guide, optax.adam(0.01), Trace_ELBO())
fitted = svi.run(jax.random.key(0), options.steps, tokens, progress_bar=False)
predictive = Predictive(model, guide=guide, params=fitted.params, num_samples=500)
approximate = predictive(jax.random.key(1), tokens)

# NUTS, from the prior.
result = sample(
    model,
    model_args=(tokens,),
    config=SampleConfig(warmup=options.warmup, draws=options.draws),
    progress=True,
)
tree = to_datatree(result, log_likelihood=True)
options.out.mkdir(parents=True, exist_ok=True)
tree.to_netcdf(options.out / "posterior.nc")

# What no rotation of the embeddings changes.
names = ["coupling_trace", "coupling_norm", "coupling_eigenvalues", "smallest_margin"]
print(az.summary(tree, var_names=names))
truth["smallest_margin"] = truth["margin"][:, 2:].min()
approximate["smallest_margin"] = approximate["margin"][:, :, 2:].min((1, 2))
print(f"{'':24s}{'truth':>8s}{'mean field':>18s}{'NUTS':>18s}{'rank of truth':>16s}")
for name in names:
    draws = np.atleast_3d(tree["posterior"][name].values)
    points = np.atleast_1d(truth[name])
    approximations = np.asarray(approximate[name]).reshape(500, -1)
    for entry, point in enumerate(points):
        label = name if len(points) == 1 else f"{name}[{entry}]"
        exact, other = draws[..., entry], approximations[:, entry]
        print(
            f"{label:24s}{point:8.3f}{other.mean():10.3f} ± {other.std():5.3f}"
            f"{exact.mean():10.3f} ± {exact.std():5.3f}{100 * np.mean(exact < point):14.1f} %"
        )
print(f"{result.divergences} of {tree['posterior']['smallest_margin'].size} draws diverged")
marks = {
    "truth": float(truth["smallest_margin"]),
    "mean field": float(np.median(approximate["smallest_margin"])),
}
figure = smallest_margin(tree["posterior"]["smallest_margin"].values, marks)
print("wrote", save_figure(figure, options.out / "smallest_margin.png"))
