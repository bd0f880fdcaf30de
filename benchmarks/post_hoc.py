"""Do post-hoc margins depend on the seed of their fit, or on how long it may go on?

Fits the attention prior of a run from several seeds, and once with twice the iterations, and
prints what each says of the margins of the validation text.

    python benchmarks/post_hoc.py demo/ce demo/margin
"""

import argparse
import time

import jax.numpy as jnp
import numpy as np

from probattn import coupling, stability_margin
from probattn.inference import load_run
from probattn.inference.evaluation.post_hoc import STEPS, TOKENS, fit_attention_prior
from probattn.models.transformer import embed
from probattn.text.batches import windows
from probattn.text.corpora import load_corpus

MARGIN_TOKENS = 8192  # of the validation text


def main() -> None:
    """Print a line per fit."""
    parser = argparse.ArgumentParser(description="post-hoc margins from several seeds")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for path in options.runs:
        run = load_run(path)
        model = run.config.model
        corpus = load_corpus(run.config.data)
        embedded = []
        for text, most in ((corpus.train, TOKENS), (corpus.validation, MARGIN_TOKENS)):
            tokens = run.vocabulary.encode(text)
            plan = windows(len(tokens), block=model.block).spread(most)
            embedded.append(embed(run.parameters, jnp.asarray(plan.take(tokens))))
        fits = [(seed, STEPS) for seed in range(options.seeds)] + [(0, 2 * STEPS)]
        for seed, steps in fits:
            began = time.perf_counter()
            prior = fit_attention_prior(
                embedded[0], rank=model.prior_rank, bound=model.bound, seed=seed, steps=steps
            )
            seconds = time.perf_counter() - began
            matrices = jnp.asarray(prior.w_query), jnp.asarray(prior.w_key)
            margin = stability_margin(embedded[1], *matrices, bound=model.bound)
            inner = np.asarray(margin)[:, 2:]
            low, fifth, median = np.quantile(inner, [0.01, 0.05, 0.5])
            print(
                f"{path} seed {seed} of at most {steps} iterations: median {median:.4f}, 5 % "
                f"{fifth:.4f}, 1 % {low:.4f}, negative {100 * np.mean(inner < 0):.2f} %, norm of A "
                f"{float(jnp.linalg.norm(coupling(*matrices))):.3f}; converged {prior.converged}, "
                f"gradient {prior.gradient_norm:.1e}, disagreement {prior.disagreement:.1e}, "
                f"{prior.steps} iterations, {seconds:.0f} s"
            )


if __name__ == "__main__":
    main()
