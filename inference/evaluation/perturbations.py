"""Noise on what enters the stack, of several kinds: each a frozen dataclass that is called.

A perturbation takes the place of `embed`: it makes what enters the stack out of the tokens. It is a
pytree, so that one compiled program serves every level of a kind. Levels of noise on embeddings are
a standard deviation sigma, in the embedding's unit, whatever the kind: uniform noise has that
standard deviation, and a worst-case direction the length that Gaussian noise of it has.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

NoiseKind = Literal["gaussian", "uniform", "ascent-1", "ascent-10", "substitution"]
Losses = Callable[[Float[Array, "B T d"]], Float[Array, "B T"]]
Embed = Callable[[Int[Array, "B T"]], Float[Array, "B T d"]]

_STRIDE = 2.5  # a step of ascent, in radii over the number of steps


class Perturbation(Protocol):
    """What enters the stack, disturbed."""

    def __call__(
        self,
        rng_key: Array,
        embed: Embed,
        inputs: Int[Array, "B T"],
        losses: Losses | None = None,
    ) -> Float[Array, "B T d"]:
        """Embed the tokens of B windows and disturb them.

        Args:
            rng_key: key of the random numbers.
            embed: function from tokens to what enters the stack.
            inputs: tokens of each window.
            losses: function from what enters the stack to the loss of every position, for a kind
                that looks for a direction.
        """


@register_dataclass
@dataclass(frozen=True)
class Gaussian:
    """Independent Normal(0, sigma^2) noise on every coordinate."""

    sigma: ArrayLike

    def __call__(
        self,
        rng_key: Array,
        embed: Embed,
        inputs: Int[Array, "B T"],
        losses: Losses | None = None,
    ) -> Float[Array, "B T d"]:
        """Embed and add noise."""
        x = embed(inputs)
        return x + self.sigma * jax.random.normal(rng_key, x.shape, x.dtype)


@register_dataclass
@dataclass(frozen=True)
class Uniform:
    """Independent noise on every coordinate, uniform from -sqrt(3) sigma to sqrt(3) sigma.

    Its standard deviation is sigma, that of Gaussian noise of the level.
    """

    sigma: ArrayLike

    def __call__(
        self,
        rng_key: Array,
        embed: Embed,
        inputs: Int[Array, "B T"],
        losses: Losses | None = None,
    ) -> Float[Array, "B T d"]:
        """Embed and add noise."""
        x = embed(inputs)
        edge = 3**0.5
        return x + self.sigma * jax.random.uniform(rng_key, x.shape, x.dtype, -edge, edge)


@register_dataclass
@dataclass(frozen=True)
class Substitution:
    """Each input token replaced, with a probability, by one drawn from given frequencies.

    With the frequencies of the training text this is the unigram noise of Xie et al. 2017
    (arXiv:1703.02573). It leaves the frequency of each token as it is and destroys only what stands
    where; drawn uniformly, most replacements would be symbols that the network has hardly seen,
    and the harm a matter of the vocabulary's size. A draw may be the token itself. What is
    predicted stays the text's own next token.

    Attributes:
        probability: probability of a token to be replaced, 0 to 1.
        frequencies: frequencies of the symbols (V,), >= 0, of any sum.
    """

    probability: ArrayLike
    frequencies: ArrayLike

    def __call__(
        self,
        rng_key: Array,
        embed: Embed,
        inputs: Int[Array, "B T"],
        losses: Losses | None = None,
    ) -> Float[Array, "B T d"]:
        """Replace tokens and embed."""
        which, what = jax.random.split(rng_key)
        drawn = jax.random.categorical(
            what, jnp.log(jnp.asarray(self.frequencies)), shape=jnp.shape(inputs)
        )
        # One uniform number a token: what a level replaces, a higher level replaces as well.
        replaced = jax.random.uniform(which, jnp.shape(inputs)) < self.probability
        return embed(jnp.where(replaced, drawn, inputs))


@register_dataclass
@dataclass(frozen=True)
class Ascent:
    """A worst-case direction: projected gradient ascent of the loss (Madry et al. 2018).

    The displacement of each token stays in a ball of radius sigma sqrt(d), the length of Gaussian
    noise of standard deviation sigma on its d coordinates. From the clean point on, each step moves
    every token by 2.5 radius / steps along its own gradient of the summed loss of its window, and
    back into its ball (arXiv:1706.06083, whose stride this is; a single step ends on the sphere).
    Of the points visited, the clean one among them, each window keeps that of its largest loss, so
    that no window gains. Nothing in it is random.

    Attributes:
        sigma: radius of the ball over sqrt(d).
        steps: number of steps of ascent, at least 1.
    """

    sigma: ArrayLike
    steps: int = field(default=1, metadata={"static": True})

    def __call__(
        self,
        rng_key: Array,
        embed: Embed,
        inputs: Int[Array, "B T"],
        losses: Losses | None = None,
    ) -> Float[Array, "B T d"]:
        """Embed and move each token to where the window's loss is large.

        Raises:
            ValueError: if there are no losses to ascend, or less than one step.
        """
        if losses is None or self.steps < 1:
            raise ValueError(
                f"ascent: got {self.steps} steps on {losses}: expected at least one, and the losses"
            )
        x = embed(inputs)
        radius = jnp.asarray(self.sigma, x.dtype) * x.shape[-1] ** 0.5
        stride = _STRIDE / self.steps

        def of_windows(moved: Float[Array, "B T d"]) -> tuple[Array, Array]:
            per_window = losses(x + radius * moved).sum(-1)
            return per_window.sum(), per_window

        def step(carry: tuple[Array, Array, Array], _: None) -> tuple[Any, None]:
            moved, best, best_loss = carry
            (_, loss), gradient = jax.value_and_grad(of_windows, has_aux=True)(moved)
            best, best_loss = _better(moved, loss, best, best_loss)
            return (_into_ball(moved + stride * _direction(gradient)), best, best_loss), None

        # Displacements in units of the radius: where it is 0, their gradient is 0 as well.
        start = jnp.zeros_like(x)
        none = jnp.full(x.shape[0], -jnp.inf, x.dtype)
        (moved, best, best_loss), _ = jax.lax.scan(step, (start, start, none), length=self.steps)
        best, _ = _better(moved, of_windows(moved)[1], best, best_loss)
        return x + radius * best


_ON_EMBEDDINGS: dict[str, Callable[[ArrayLike], Perturbation]] = {
    "gaussian": Gaussian,
    "uniform": Uniform,
    "ascent-1": partial(Ascent, steps=1),
    "ascent-10": partial(Ascent, steps=10),
}


def perturbation(
    kind: NoiseKind, level: float, *, frequencies: ArrayLike | None = None
) -> Perturbation:
    """Make the perturbation of a kind at a level.

    Args:
        kind: kind of perturbation.
        level: sigma, or of substitution the probability of a token to be replaced.
        frequencies: frequencies of the symbols that substitution draws from (V,).

    Raises:
        ValueError: if the kind is unknown, or substitution without frequencies.
    """
    if kind in _ON_EMBEDDINGS:
        return _ON_EMBEDDINGS[kind](level)
    if kind != "substitution":
        raise ValueError(
            f"noise kind: got {kind!r}, expected one of {', '.join(get_args(NoiseKind))}"
        )
    if frequencies is None:
        raise ValueError("substitution: got no frequencies, expected those of the symbols")
    return Substitution(level, frequencies)


def _direction(gradient: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
    """Scale each token's gradient to length 1; 0 where there is none."""
    length = jnp.linalg.norm(gradient, axis=-1, keepdims=True)
    return gradient / jnp.where(length > 0, length, 1)


def _into_ball(moved: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
    """Shorten each token's displacement to length 1 where it is longer."""
    return moved / jnp.maximum(jnp.linalg.norm(moved, axis=-1, keepdims=True), 1)


def _better(
    moved: Float[Array, "B T d"],
    loss: Float[Array, " B"],
    best: Float[Array, "B T d"],
    best_loss: Float[Array, " B"],
) -> tuple[Float[Array, "B T d"], Float[Array, " B"]]:
    larger = loss > best_loss
    return jnp.where(larger[:, None, None], moved, best), jnp.where(larger, loss, best_loss)
