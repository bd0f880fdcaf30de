"""What is known of every token as it is read or generated: margins, loss, entropy, repetition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from decoding_questions import PRIMARY
from loops import loop_start, repeated_share

from probattn.inference.evaluation.attention_stages import stage_margins, stages
from probattn.inference.runs.imported import ImportedRun
from probattn.text.batches import map_batches

Found = dict[str, np.ndarray]


def measure(run: ImportedRun, tokens: np.ndarray) -> Found:
    """Measure every token of some sequences (B, T), from itself and the tokens before it.

    Margins are those of the heads of the first layer, taken of a whole sequence at once: what
    follows a token does not change them.

    Returns:
        `margin_head_N` and `margin_worst`; the token's own `loss`; `entropy` and largest
        `probability` of the prediction made at it; `repeated`; and `loop`, where the sequence's
        loop begins. All (B, T).
    """
    margins = [stage_margins(run, stage, tokens).margin for stage in stages(run, None)]
    found = {f"margin_head_{n}": margin for n, margin in enumerate(margins, start=1)}
    found[PRIMARY] = np.min(margins, axis=0)
    of_batch = partial(_predictions, run.parameters, network=run.network)
    found |= map_batches(lambda _, rows: of_batch(tokens[rows]), len(tokens), 1)
    found["repeated"] = np.array([repeated_share(row) for row in tokens])
    starts = np.array([loop_start(row) for row in tokens])
    found["loop"] = np.broadcast_to(starts[:, None], tokens.shape)
    return found


@partial(jax.jit, static_argnames="network")
def _predictions(parameters, tokens, *, network):
    log_p = jax.nn.log_softmax(network.logits(parameters, network.embed(parameters, tokens)))
    own = jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return {
        "loss": jnp.pad(-own, [(0, 0), (1, 0)], constant_values=jnp.nan),
        "entropy": -jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
        "probability": jnp.exp(log_p.max(-1)),
    }
