"""What a model consists of, and plates of it that take a minibatch of the data."""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Var
from jaxtyping import Array, Float, Int
from numpyro.handlers import seed, trace
from numpyro.primitives import Messenger

from probattn.inference.config_sampling import SampleConfig

# What makes indices of indices, as NumPy's negative ones become others, and what calls a program.
_OF_INDICES = {"add", "broadcast_in_dim", "clamp", "convert_element_type", "lt", "reshape"}
_OF_INDICES |= {"select_n", "squeeze"}
_CALLS = {"closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit"}


class Subsample(NamedTuple):
    """A plate that takes a minibatch.

    Attributes:
        name: its name.
        size: the number of its rows, N.
        batch: the number of rows that it takes, B.
    """

    name: str
    size: int
    batch: int


class Latent(NamedTuple):
    """A latent site: the shape of its values, whether they are discrete, and its plates' names."""

    shape: tuple[int, ...]
    is_discrete: bool
    plates: frozenset[str]


class Contents(NamedTuple):
    """The latent sites of a model by name, and its plates that have a subsample_size."""

    latent: dict[str, Latent]
    plates: list[Subsample]


class rows_of(Messenger):  # noqa: N801, the name of a handler, as NumPyro's are
    """Let a plate have the rows given, scaled to all of its rows by NumPyro's own rule.

    Args:
        model: the model.
        plate: name of the plate; None for every plate that takes a minibatch.
        rows: its rows; None for all of them.
    """

    def __init__(
        self, model: Callable, plate: str | None = None, rows: Int[Array, " B"] | None = None
    ) -> None:
        super().__init__(model)
        self._plate, self._rows = plate, rows

    def process_message(self, msg: dict[str, Any]) -> None:
        """Set the rows of the plate."""
        if msg["type"] != "plate" or msg["args"][1] is None:
            return
        if self._plate in (None, msg["name"]):
            size = msg["args"][0]
            rows = jnp.arange(size) if self._rows is None else self._rows
            msg["args"], msg["value"] = (size, rows.shape[0]), rows


def of_all_rows(model: Callable) -> Callable:
    """Return the model whose plates have all of their rows, of data that may be NumPy's."""

    @wraps(model)
    def whole(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = indexable((args, kwargs))
        return rows_of(model)(*args, **kwargs)

    return whole


def indexable(arguments: Any) -> Any:
    """Return arguments with JAX's arrays for NumPy's, which what JAX traces cannot index."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, arguments
    )


def contents(model: Callable, arguments: Sequence) -> Contents:
    """Trace a model, without computing anything."""
    latent, plates = {}, []

    def run() -> None:
        sites = trace(seed(model, jax.random.key(0))).get_trace(*arguments[0], **arguments[1])
        for name, site in sites.items():
            if site["type"] == "sample" and not site["is_observed"]:
                of = frozenset(frame.name for frame in site["cond_indep_stack"])
                latent[name] = Latent(jnp.shape(site["value"]), site["fn"].support.is_discrete, of)
            if site["type"] == "plate" and site["args"][1] is not None:
                plates.append(Subsample(name, *site["args"]))

    jax.eval_shape(run)
    return Contents(latent, plates)


def check_contents(found: Contents, config: SampleConfig) -> None:
    """Refuse a model that the method cannot sample.

    Raises:
        ValueError: if a latent site is discrete, a stochastic method has no plate to take
            minibatches of, more than one, or latent sites within it, or another method has one.
    """
    if discrete := [name for name, site in found.latent.items() if site.is_discrete]:
        raise ValueError(
            f"the latent site {discrete[0]} is discrete: expected continuous latent sites alone; "
            "sum over its values in the model"
        )
    if not config.is_stochastic:
        for name, size, batch in found.plates:
            if batch < size:
                raise ValueError(
                    f"the plate {name} takes {batch} of {size} rows, and sample.method "
                    f"{config.method} would keep to those that it draws first: expected a plate "
                    "without subsample_size, or sample.method sghmc or sgld"
                )
        return
    if len(found.plates) != 1:
        names = ", ".join(plate.name for plate in found.plates) or "none"
        raise ValueError(
            f"the plates of the model with a subsample_size are: {names}; sample.method "
            f"{config.method} takes minibatches of one: expected one `plate(name, size, "
            "subsample_size=...) as rows` and data indexed by its rows, or another sample.method"
        )
    [plate] = found.plates
    for name, site in found.latent.items():
        if plate.name in site.plates:
            raise ValueError(
                f"the latent site {name} is in the plate {plate.name}, which has other rows in "
                f"every step: expected latent sites outside of it; for sample.method "
                f"{config.method} sum over them in the model, or take nuts or mclmc without "
                "subsample_size"
            )


def check_rows(
    plate: Subsample, log_density: Callable[[Int[Array, " B"]], Float[Array, ""]]
) -> None:
    """Refuse a model whose data have other rows than its plate, or that ignores them.

    Outside of its bounds JAX reads the last row, so that nobody would notice.

    Args:
        plate: the plate.
        log_density: the log density as a function of the plate's rows.

    Raises:
        ValueError: if an array is indexed by the rows that has another length than the plate, or
            the log density does not depend on the rows.
    """
    rows = jax.ShapeDtypeStruct((plate.batch,), jnp.arange(plate.size).dtype)
    program = jax.make_jaxpr(log_density)(rows)
    sizes: list[int] = []
    reached = _follow(program.jaxpr, {program.jaxpr.invars[0]: True}, sizes)
    for size in sizes:
        if size != plate.size:
            raise ValueError(
                f"the plate {plate.name} has {plate.size} rows, and an array of {size} is indexed "
                "by them: expected a plate as large as its data"
            )
    if reached[0] is None:
        raise ValueError(
            f"the model makes nothing of the rows that the plate {plate.name} takes: expected data "
            "that are indexed by them, as in `with plate(...) as rows: data[rows]`"
        )


def _follow(program: Jaxpr, known: dict[Var, bool], sizes: list[int]) -> list[bool | None]:
    """Follow indices through a program, and note the lengths of what they index.

    Args:
        program: a program of JAX.
        known: variables that depend on the indices; whether they are indices still.
        sizes: the lengths found are appended.

    Returns:
        For each result whether it is of indices; None if it does not depend on them.
    """
    known = dict(known)

    def state(variable: Any) -> bool | None:
        return known.get(variable) if isinstance(variable, Var) else None

    for equation in program.eqns:
        name = equation.primitive.name
        found = [state(variable) for variable in equation.invars]
        if all(each is None for each in found):
            continue
        if name in _CALLS:
            inner = next(_programs(equation.params))
            pairs = zip(inner.invars, found, strict=True)
            results = _follow(inner, {at: each for at, each in pairs if each is not None}, sizes)
        else:
            if name == "gather" and found[1]:
                axes = equation.params["dimension_numbers"].start_index_map
                indexed: Any = equation.invars[0].aval
                if len(axes) == 1:
                    sizes.append(indexed.shape[axes[0]])
            results = [name in _OF_INDICES and False not in found] * len(equation.outvars)
        pairs = zip(equation.outvars, results, strict=True)
        known |= {variable: result for variable, result in pairs if result is not None}
    return [state(variable) for variable in program.outvars]


def _programs(parameters: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in parameters.values():
        program = getattr(value, "jaxpr", value)
        if isinstance(program, Jaxpr):
            yield program
