"""Posterior of latent embeddings of a text: fit by SVI, sample by NUTS, analyse with ArviZ.

    python examples/posterior_text.py [--warmup 500] [--draws 3000] [--out runs/text]

The text is Python's own language reference, its 11 most frequent characters and one symbol for
all others. Prints the posterior beside the prior and the positions most likely to be support
tokens, and leaves the run in --out: draws, posterior.nc and figures.
"""

import argparse
from pathlib import Path

import arviz as az
import jax
import numpy as np
import optax
from numpyro.infer import SVI, Trace_ELBO, init_to_sample
from numpyro.infer.autoguide import AutoDelta

from probattn.inference import SampleConfig, SampleRunConfig, load_run, sample_run, to_datatree
from probattn.inference.figures.report import posterior_report
from probattn.models import LatentEmbeddingsConfig
from probattn.text.corpora import DataConfig

parser = argparse.ArgumentParser(description="posterior of latent embeddings of a text")
parser.add_argument("--sequences", type=int, default=16)
parser.add_argument("--length", type=int, default=32)
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--warmup", type=int, default=500)
parser.add_argument("--draws", type=int, default=3000)
parser.add_argument("--out", type=Path, default=Path("runs/text"))
options = parser.parse_args()

config = SampleRunConfig(
    data=DataConfig(source="pydoc", tokenizer="frequent:12"),
    sample=SampleConfig(warmup=options.warmup, draws=options.draws),
    latent=LatentEmbeddingsConfig(width=3, sequences=options.sequences, length=options.length),
)

# The full posterior. Interrupted, it goes on where it was with resume=True.
run, result = sample_run(config, options.out, overwrite=True, progress=True)
tree, files = posterior_report(run)
names = ["coupling_trace", "coupling_norm", "coupling_eigenvalues", "smallest_margin"]
print(az.summary(tree, var_names=names))
print(f"{result.divergences} of {np.prod(result.shape)} draws diverged")

# What the text taught: the posterior beside the prior.
prior = to_datatree(load_run(options.out), prior=1000)["prior"].to_dataset()
for name in ("coupling_trace", "coupling_norm"):
    learnt, before = tree["posterior"][name].values, prior[name].values
    print(
        f"{name}: prior {before.mean():.3f} ± {before.std():.3f}, "
        f"posterior {learnt.mean():.3f} ± {learnt.std():.3f}"
    )

# The same model by MAP, with NumPyro's own SVI: a point has no support probability, and a mode in
# 1,500 dimensions lies far from where the posterior's mass is.
guide = AutoDelta(result.model, init_loc_fn=init_to_sample)
svi = SVI(result.model, guide, optax.adam(0.01), Trace_ELBO())
fitted = svi.run(jax.random.key(0), options.steps, *result.model_args, progress_bar=False)
mode = guide.median(fitted.params)
lengths = {
    "MAP": np.linalg.norm(mode["embeddings"], axis=-1).mean(),
    "posterior": np.linalg.norm(result.draws["embeddings"], axis=-1).mean(),
}
print("mean length of an embedding: " + ", ".join(f"{k} {v:.2f}" for k, v in lengths.items()))

# Which tokens hold the model close to instability, and how sure are we?
probability = tree["support_tokens"]["support_probability"].values
observed = tree["observed_data"]["tokens"].values
for sequence in range(min(4, options.sequences)):
    position = int(probability[sequence].argmax())
    text = run.vocabulary.decode(observed[sequence])
    print(
        f"sequence {sequence}: position {position} is the support token with probability "
        f"{probability[sequence, position]:.2f}: {text[:position]!r} -> {text[position]!r}"
    )
for path in files:
    print("wrote", path)
