"""The paper's own figures and numbers, computed: what is drawn, and how it compares.

Every array comes from the public functions of `probattn`; the numbers called "formula" are worked
out by hand from the paper's definitions.
"""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from probattn import CausalAttention, attention_weights, certificate, conditional_mass, log_det
from probattn.text.corpora import DataConfig, load_corpus

PAST = (0.0, 2.0)  # x_1 and x_2 of figure 3.2
PAIR = (-0.25, 0.0, 0.25)  # its couplings in panels (a) and (b)
FAMILY = (-0.55, -0.35, 0.0, 0.35, 0.55)  # couplings in panel (c)
STRENGTH, SEQUENCES, LENGTH, VARIANCE = 0.2, 4000, 5, 4.0  # settings of figure 3.3
SEEDS = 20
BOUND = 2.0  # bound of the context in the figure of proper conditionals, in units of sigma
TEXT = "support token"  # text of figure 1.1
DIRECTIONS = (0.0, -0.9, 1.0, 0.6), (0.4, -0.2, 1.8, 0.7)  # W_Q and W_K of figure 1.1
NEAREST = 0.3  # determinant of its support token


@dataclass(frozen=True)
class PaperComparison:
    """One number of the paper.

    Attributes:
        figure: where it stands in the paper.
        quantity: what it is.
        paper: as printed there.
        formula: value by hand from the definitions; empty where there is no closed form.
        reproduced: as computed here.
    """

    figure: str
    quantity: str
    paper: str
    formula: str
    reproduced: str


@dataclass(frozen=True)
class Trajectory:
    """Tokens of a text in the plane where the boundary is one curve (figure 1.1).

    With rank one, det D_t = 1 - sigma_q rho sigma_k, sigma_q being the standard deviation of the
    past's queries under the attention of token t and rho sigma_k what its keys share with them.

    Attributes:
        tokens: the characters, without the first two, whose past has no spread.
        query_spread: sigma_q of each.
        key_spread: rho sigma_k of each, positive.
        determinant: det D_t.
    """

    tokens: list[str]
    query_spread: Float[np.ndarray, " n"]
    key_spread: Float[np.ndarray, " n"]
    determinant: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Cloud:
    """Random sequences under one coupling (figure 3.3).

    Attributes:
        coupling: a.
        variance: attention-weighted variance at the last position of each sequence; that it is
            the last the paper does not say, but its largest value, 16, does.
        factor: 1 - a Var there.
        log_density: -inf where the factor of any position is not positive.
    """

    coupling: float
    variance: Float[np.ndarray, " n"]
    factor: Float[np.ndarray, " n"]
    log_density: Float[np.ndarray, " n"]

    @property
    def valid(self) -> int:
        """Sequences of positive density."""
        return int(np.isfinite(self.log_density).sum())


@dataclass(frozen=True)
class MassMap:
    """Conditional mass over coupling and spread of a context of two tokens.

    Attributes:
        bound: c, or None.
        coupling: a (columns,).
        spread: distance of the two tokens (rows,), in units of sigma.
        mass: (rows, columns).
        certificate: rho (rows, columns); below 1 the mass is proved to be one.
    """

    bound: float | None
    coupling: Float[np.ndarray, " columns"]
    spread: Float[np.ndarray, " rows"]
    mass: Float[np.ndarray, "rows columns"]
    certificate: Float[np.ndarray, "rows columns"]


def trajectory() -> Trajectory:
    """Embed characters by the statistics of the pydoc text, coupled almost to instability.

    The embedding is that of the leading singular vectors of the characters' log bigram counts; the
    strength of the coupling is the smallest at which a determinant falls to `NEAREST`.
    """
    text = load_corpus(DataConfig()).train
    index = {symbol: number for number, symbol in enumerate(sorted(set(text)))}
    counts = np.zeros((len(index), len(index)))
    for (first, second), count in Counter(pairwise(text)).items():
        counts[index[first], index[second]] = count
    table = np.log1p(counts)
    embedding = np.linalg.svd(table - table.mean(0), full_matrices=False)[0][:, :4]
    embedding *= np.sign(embedding[np.abs(embedding).argmax(0), range(4)])
    embedding /= embedding.std(0)
    x = jnp.asarray(embedding[[index[character] for character in TEXT]], jnp.float32)
    w_query, w_key = (jnp.array([column], jnp.float32).T for column in DIRECTIONS)

    def spreads(strength: float) -> tuple[np.ndarray, np.ndarray]:
        query, key = x @ (strength * w_query), x @ w_key
        weights = attention_weights(query, key)[2:]
        q, k = (each.T - weights @ each for each in (query, key))
        q_spread = jnp.sqrt(jnp.sum(weights * q**2, axis=1))
        return np.asarray(q_spread), np.asarray(jnp.sum(weights * q * k, axis=1) / q_spread)

    strength = 0.01
    while np.max(np.prod(spreads(strength), axis=0)) < 1 - NEAREST:
        strength *= 1.01
    q_spread, k_spread = spreads(strength)
    sign, log_abs = log_det(x, strength * w_query, w_key)
    determinant = np.asarray(sign * jnp.exp(log_abs))[2:]
    shown = k_spread > 0
    tokens = [character for character, kept in zip(TEXT[2:], shown, strict=True) if kept]
    return Trajectory(tokens, q_spread[shown], k_spread[shown], determinant[shown])


def conditional_density(
    coupling: float, grid: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Compute the density of x_3 given x_1 and x_2 at sigma = 1, and its factor 1 - a Var.

    Figure 3.2 shows them.
    """
    past = np.array(PAST)
    x = jnp.concatenate([jnp.broadcast_to(past, (len(grid), 2)), grid[:, None]], axis=1)[..., None]
    joint, factors = _densities(coupling, x)
    earlier, _ = _densities(coupling, x[:, :2])
    return np.asarray(jnp.exp(joint - earlier)), np.asarray(factors[:, 2])


def cloud(coupling: float, seed: int) -> Cloud:
    """Draw the random sequences of figure 3.3, for one seed."""
    key = jax.random.key(seed)
    x = math.sqrt(VARIANCE) * jax.random.normal(key, (SEQUENCES, LENGTH, 1))
    log_density, factors = _densities(coupling, x)
    factor = np.asarray(factors)[:, -1]
    return Cloud(coupling, (1 - factor) / coupling, factor, np.asarray(log_density))


@jax.jit
def _densities(
    coupling: float, x: Float[Array, "n T 1"]
) -> tuple[Float[Array, " n"], Float[Array, "n T"]]:
    """Return log densities of sequences at sigma = 1, and the factors det D_t of all positions."""
    weights = jnp.full((1, 1), coupling), jnp.ones((1, 1))
    sign, log_abs = log_det(x, *weights)
    log_density = CausalAttention(*weights, 1.0, x.shape[1]).log_prob(x)
    return log_density, sign * jnp.exp(log_abs)


def mass_map(bound: float | None, size: int = 41) -> MassMap:
    """Map where a token's conditional after two others is proper; they lie at +- spread / 2."""
    couplings, spreads = np.geomspace(0.02, 2.0, size), np.geomspace(0.5, 20.0, size)
    one = np.ones((1, 1))
    mass, rho = np.empty((size, size)), np.empty((size, size))
    for row, spread in enumerate(spreads):
        past = np.array([[-spread / 2], [spread / 2]])
        # The certificate looks at the past alone: any third token will do.
        context = jnp.array([*past, [0.0]])
        weights = jnp.asarray(couplings)[:, None, None], jnp.asarray(one)
        rho[row] = certificate(context, *weights, bound=bound)[:, 2]
        for column, coupling in enumerate(couplings):
            mass[row, column] = conditional_mass(past, coupling * one, one, 1.0, bound=bound)
    return MassMap(bound, couplings, spreads, mass, rho)


def comparisons(clouds: dict[float, list[Cloud]]) -> list[PaperComparison]:
    """Return the paper's numbers beside ours.

    Args:
        clouds: clouds of figure 3.3 by coupling, one per seed.
    """
    rows = []
    grid = np.linspace(-4, 6, 2001)
    peaks = {0.0: "0.38", 0.25: "0.32", -0.25: "0.52"}
    for coupling, printed in {0.25: "0.75", -0.25: "1.25"}.items():
        _, factor = conditional_density(coupling, np.zeros(1))
        formula = 1 - coupling * (PAST[1] - PAST[0]) ** 2 / 4  # at x_3 = 0 both weigh a half
        rows.append(
            PaperComparison(
                "3.2 (b)",
                f"factor at x_3 = 0, a = {coupling:+}",
                printed,
                f"{formula:.4g}",
                f"{factor[0]:.4g}",
            )
        )
    for coupling, printed in peaks.items():
        density, _ = conditional_density(coupling, grid)
        weight = 1 / (1 + np.exp(-coupling * grid * PAST[1]))
        by_hand = (1 - coupling * PAST[1] ** 2 * weight * (1 - weight)) * np.exp(
            -((grid - PAST[1] * weight) ** 2) / 2
        )
        rows.append(
            PaperComparison(
                "3.2 (a)",
                f"peak of the density of x_3, a = {coupling:+}",
                printed,
                f"{by_hand.max() / math.sqrt(2 * math.pi):.3f}",
                f"{density.max():.3f}",
            )
        )
    for coupling, printed in {STRENGTH: "3387", -STRENGTH: "4000"}.items():
        counts = [each.valid for each in clouds[coupling]]
        spread = f" +- {np.std(counts, ddof=1):.0f}" if np.std(counts) else ""
        rows.append(
            PaperComparison(
                "3.3",
                f"valid of {SEQUENCES} sequences, a = {coupling:+}, {len(counts)} seeds",
                printed,
                "" if coupling > 0 else str(SEQUENCES),
                f"{np.mean(counts):.0f}{spread}",
            )
        )
    widest = [each.variance.max() for each in clouds[-STRENGTH]]
    rows.append(
        PaperComparison(
            "3.3 (c)",
            f"largest Var, a = -{STRENGTH}",
            "about 16",
            "",
            f"{np.mean(widest):.1f} +- {np.std(widest, ddof=1):.1f}",
        )
    )
    return rows
