"""What a model consists of, and plates of it that take a minibatch of the data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, Float, Int
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import init_to_sample
from numpyro.primitives import Messenger

from probattn.inference.config_sampling import SampleConfig

# What makes indices of indices, as NumPy's negative ones become others, and what calls a program.
_OF_INDICES = {"add", "broadcast_in_dim", "clamp", "convert_element_type", "lt", "reshape"}
_OF_INDICES |= {"select_n", "squeeze", "sub"}
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
            rows = _first_rows(size) if self._rows is None else self._rows
            msg["args"], msg["value"] = (size, rows.shape[0]), rows


class _FirstMinibatch(Messenger):
    """Let plates take their first rows where they would draw some: shapes are the same."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate" and msg["value"] is None:
            msg["value"] = _first_rows(msg["args"][1])


def _first_rows(count: int) -> Int[Array, " B"]:
    with jax.ensure_compile_time_eval():  # numbers also where JAX traces: they index NumPy's arrays
        return jnp.arange(count)


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
        # Some priors, such as ImproperUniform, cannot be drawn from.
        start = substitute(
            seed(_FirstMinibatch(model), jax.random.key(0)), substitute_fn=init_to_sample
        )
        sites = trace(start).get_trace(*arguments[0], **arguments[1])
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
    """Refuse a model whose plate reads other rows than its data have, or that ignores the rows.

    Outside of its bounds JAX reads the last row, so that nobody would notice. The rows, or numbers
    made of them, such as rows + 1, may index an array if together they read all of it and nothing
    beyond.

    Args:
        plate: the plate.
        log_density: the log density as a function of the plate's rows.

    Raises:
        ValueError: if the rows read but a part of an array, or beyond it, or the log density does
            not depend on them.
    """
    starts = np.minimum(np.arange(0, plate.size, plate.batch), plate.size - plate.batch)
    rows = jnp.asarray(starts[:, None] + np.arange(plate.batch), jnp.arange(plate.size).dtype)
    program = jax.make_jaxpr(log_density)(jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype))
    reads: _Reads = {}
    [found] = _follow(program.jaxpr, program.consts, [_Variable(True, lambda: rows)], reads)
    for read in reads.values():
        indices = np.unique(np.concatenate(read.indices))
        if not np.array_equal(indices, np.arange(read.length)):
            raise ValueError(
                f"the plate {plate.name} has {plate.size} rows, and an array of {read.length} is "
                f"indexed by them at {indices[0]} to {indices[-1]}: expected a plate as large as "
                "its data; of a longer array index a part, as in `y[:-1][rows]` and `y[1:][rows]`"
            )
    if not found.of_rows:
        raise ValueError(
            f"the model makes nothing of the rows that the plate {plate.name} takes: expected data "
            "that are indexed by them, as in `with plate(...) as rows: data[rows]`"
        )


@dataclass(frozen=True, eq=False)
class _Variable:
    """A variable of a program.

    Attributes:
        of_rows: whether it depends on the rows.
        values: computes its value; of an index that is made of the rows those in all minibatches,
            along a first axis. None of what else depends on the rows.
    """

    of_rows: bool
    values: Callable[[], Any] | None


class _Read(NamedTuple):
    """The length of an array along an axis, and the indices that are read there."""

    length: int
    indices: list[np.ndarray]


type _Reads = dict[tuple[_Variable, int], _Read]


def _follow(
    program: Jaxpr,
    constants: Sequence[Any],
    inputs: Sequence[_Variable],
    reads: _Reads,
) -> list[_Variable]:
    """Follow the rows through a program, and note what they read.

    Args:
        program: a program of JAX.
        constants: its constants.
        inputs: its inputs.
        reads: what is read of each array along each axis; what is found is added.

    Returns:
        Its results.
    """
    known = dict(zip(program.invars, inputs, strict=True))
    for variable, constant in zip(program.constvars, constants, strict=True):
        known[variable] = _constant(constant)
    for equation in program.eqns:
        found = [_of(variable, known) for variable in equation.invars]
        name = equation.primitive.name
        if name in _CALLS:
            results = _follow(*_called(equation.params), found, reads)
        else:
            if name == "gather" and found[1].of_rows and found[1].values is not None:
                _note(equation, found[0], np.asarray(found[1].values()), reads)
            results = _results(equation, found)
        known |= zip(equation.outvars, results, strict=True)
    return [_of(variable, known) for variable in program.outvars]


def _of(variable: Any, known: Mapping[Var, _Variable]) -> _Variable:
    return _constant(variable.val) if isinstance(variable, Literal) else known[variable]


def _constant(value: Any) -> _Variable:
    return _Variable(False, lambda: value)


def _called(parameters: Mapping[str, Any]) -> tuple[Jaxpr, Sequence[Any]]:
    """Return the program that is called, and its constants."""
    for value in parameters.values():
        if isinstance(program := getattr(value, "jaxpr", value), Jaxpr):
            return program, getattr(value, "consts", ())
    raise AssertionError("a call without a program")


def _results(equation: JaxprEqn, found: Sequence[_Variable]) -> list[_Variable]:
    of_rows = any(each.of_rows for each in found)
    if of_rows and not _is_index(equation, found):
        return [_Variable(True, None) for _ in equation.outvars]

    @cache
    def computed() -> Sequence[Any]:
        bind: Callable = partial(equation.primitive.bind, **equation.params)
        if of_rows:
            bind = jax.vmap(bind, tuple(0 if each.of_rows else None for each in found))
        values = bind(*[each.values() for each in found if each.values is not None])
        return values if equation.primitive.multiple_results else [values]

    def of(number: int) -> _Variable:
        return _Variable(of_rows, lambda: computed()[number])

    return [of(number) for number in range(len(equation.outvars))]


def _is_index(equation: JaxprEqn, found: Sequence[_Variable]) -> bool:
    """Tell whether the result is an index that is made of indices."""
    result: Any = equation.outvars[0].aval
    return (
        equation.primitive.name in _OF_INDICES
        and all(each.values is not None for each in found)
        and (jnp.issubdtype(result.dtype, jnp.integer) or result.dtype == bool)
    )


def _note(equation: JaxprEqn, array: _Variable, indices: np.ndarray, reads: _Reads) -> None:
    """Note what is read of an array, if the rows index one of its axes alone."""
    axes = equation.params["dimension_numbers"].start_index_map
    if len(axes) == 1:
        indexed: Any = equation.invars[0].aval
        read = reads.setdefault((array, axes[0]), _Read(indexed.shape[axes[0]], []))
        slices = np.arange(equation.params["slice_sizes"][axes[0]])
        read.indices.append(np.unique(indices.reshape(-1, 1) + slices))
