"""Chains of NumPyro's NUTS, compiled once and advanced by any number of iterations.

Where there are several devices, chains run on all of them: chain i of method parallel on device i
modulo their number, those of method vectorized in equal parts.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import NUTS, init_to_sample
from numpyro.infer.hmc import HMCState
from numpyro.infer.util import log_density

from probattn import CausalAttention, log_det
from probattn.inference.memory import gibibytes
from probattn.inference.sample_config import SampleConfig

_ITERATIONS, _VALUES = 400, 2**24  # in one call, and numbers in its buffers, at most
_LARGEST = 16 * 2**30  # bytes of all draws

# What ArviZ calls the fields of NumPyro's state.
_STATISTICS: Mapping[str, Callable[[HMCState], Array]] = {
    "diverging": lambda state: state.diverging,
    "acceptance_rate": lambda state: state.accept_prob,
    "n_steps": lambda state: state.num_steps,
    "energy": lambda state: state.energy,
    "lp": lambda state: -state.potential_energy,
    "step_size": lambda state: state.adapt_state.step_size,
}


class SampleError(RuntimeError):
    """A sampler cannot start or go on: the message says why, and what to try."""


class _Call(NamedTuple):
    """What one call of a chain gives back: buffers of which the first `count` rows are filled."""

    state: HMCState
    draws: dict[str, Array]
    statistics: dict[str, Array]


class Chains:
    """The compiled kernel of a model, and the state of all chains.

    Args:
        model: a NumPyro model.
        arguments: its arguments and keyword arguments.
        config: chains, warm-up, seed and method.
        start: values of sample sites that every chain starts from; other sites start from a draw
            of the prior.

    Raises:
        ValueError: if `start` names a site that the model lacks, or has density zero.
        SampleError: if a chain finds no start of positive density.
    """

    def __init__(
        self, model: Callable, arguments: Sequence, config: SampleConfig, start: Mapping
    ) -> None:
        self._config = config
        args, kwargs = arguments
        kernel = NUTS(
            model,
            target_accept_prob=config.target_accept,
            max_tree_depth=config.max_tree_depth,
            init_strategy=partial(_start_at, start),
        )
        _check_start(model, args, kwargs, start)

        def init(rng_key: Array) -> HMCState:
            return kernel.init(rng_key, config.warmup, model_args=args, model_kwargs=kwargs)

        def advance(state: HMCState, count: Array) -> _Call:
            constrain = kernel.get_constrain_fn(args, kwargs)

            def recorded(state: HMCState) -> tuple[dict, dict]:
                values = {name: of(state) for name, of in _STATISTICS.items()}
                return constrain(state.z), values

            def body(i: Array, carry: tuple) -> tuple:
                state, buffers = carry
                state = kernel.sample(state, args, kwargs)
                buffers = jax.tree.map(
                    lambda rows, row: rows.at[i].set(row), buffers, recorded(state)
                )
                return state, buffers

            shapes = jax.eval_shape(recorded, state)
            empty = jax.tree.map(
                lambda leaf: jnp.zeros((self.most, *leaf.shape), leaf.dtype), shapes
            )
            state, (draws, statistics) = jax.lax.fori_loop(0, count, body, (state, empty))
            return _Call(state, draws, statistics)

        keys = jax.random.split(jax.random.key(config.seed), config.chains)
        starts = jax.jit(jax.vmap(init)).trace(keys)
        size = sum(leaf.size for leaf in jax.tree.leaves(starts.out_info.z))  # of all chains
        _check_size(size, config)
        self.most = max(1, min(_ITERATIONS, _VALUES // size))
        self.state = jax.block_until_ready(starts.lower().compile()(keys))
        self._check_density()
        self._each = config.chain_method == "parallel"
        self._devices = jax.local_devices()[: config.chains]
        if self._each:
            # For each device the same program: a chain has the same draws on any.
            self._programs = [
                jax.jit(advance).lower(self._chain(number), np.int32(0)).compile()
                for number in range(len(self._devices))
            ]
        else:
            self._spread = _spread(config.chains, self._devices)
            of_all = jax.vmap(advance, in_axes=(0, None))
            if self._spread is not None:
                of_all = _for_own_chains(of_all, self._spread)
            self._programs = [jax.jit(of_all).lower(self._chains(), np.int32(0)).compile()]

    def advance(self, count: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Iterate all chains; draws and statistics of the iterations, (chains, count, ...)."""
        if self._each:
            with ThreadPoolExecutor(min(self._config.chains, os.cpu_count() or 1)) as pool:
                calls = list(pool.map(partial(self._run, count), range(self._config.chains)))
            call = jax.tree.map(lambda *leaves: jnp.stack(leaves), *calls)
        else:
            call = self._programs[0](self._chains(), np.int32(count))
        self.state = call.state
        # Copied: a view would keep the whole buffer.
        return jax.tree.map(
            lambda rows: np.asarray(rows)[:, :count].copy(), (call.draws, call.statistics)
        )

    def _run(self, count: int, number: int) -> _Call:
        program = self._programs[number % len(self._programs)]
        # Each thread has settings of its own.
        with jax.enable_x64(self._config.precision == "float64"):
            call = jax.block_until_ready(program(self._chain(number), np.int32(count)))
            return call if len(self._devices) == 1 else jax.device_put(call, self._devices[0])

    def _chain(self, number: int) -> HMCState:
        """The state of a chain, on its device."""
        state = jax.tree.map(lambda leaf: leaf[number], self.state)
        if len(self._devices) == 1:
            return state
        return jax.device_put(state, self._devices[number % len(self._devices)])

    def _chains(self) -> HMCState:
        """The state of all chains, on their devices."""
        return self.state if self._spread is None else jax.device_put(self.state, self._spread)

    def _check_density(self) -> None:
        energy = np.asarray(self.state.potential_energy)
        if not np.isfinite(energy).all():
            lost = [str(number) for number in np.flatnonzero(~np.isfinite(energy))]
            raise SampleError(
                f"chain {', '.join(lost)}: 100 draws of the prior have no finite log density; "
                "start from given values, such as a coupling of zero, or use a proper coupling"
            )


def _spread(chains: int, devices: Sequence[jax.Device]) -> NamedSharding | None:
    """As many chains on each of as many devices as there can be; None if that is one device."""
    count = next(n for n in range(len(devices), 0, -1) if chains % n == 0)
    if count == 1:
        return None
    return NamedSharding(Mesh(np.array(devices[:count]), ("chains",)), PartitionSpec("chains"))


def _for_own_chains(advance: Callable, spread: NamedSharding) -> Callable:
    """`advance` by every device for its own chains: none waits for those of another."""
    return jax.shard_map(
        advance,
        mesh=spread.mesh,
        in_specs=(spread.spec, PartitionSpec()),
        out_specs=spread.spec,
        check_vma=False,  # branches may return constants beside results
    )


def _check_size(size: int, config: SampleConfig) -> None:
    """Refuse draws that no memory holds, before anything is compiled."""
    total = size * config.draws * jnp.dtype(config.precision).itemsize
    if total > _LARGEST:
        raise ValueError(
            f"{config.draws} draws of {config.chains} chains of {size // config.chains:,} numbers "
            f"take {gibibytes(total)}: expected at most {gibibytes(_LARGEST)}; give a smaller "
            "model, or fewer sample.draws"
        )


def _start_at(values: Mapping[str, Any], site: dict | None = None) -> Any:
    """NumPyro initialisation: the values given, and draws from the prior for other sites."""
    if site is None:
        return partial(_start_at, values)
    if site["type"] == "sample" and site["name"] in values:
        return jnp.asarray(values[site["name"]])
    return init_to_sample(site)


def _check_start(model: Callable, args: tuple, kwargs: dict, start: Mapping) -> None:
    """Refuse a start that the model lacks or whose density is zero."""
    if not start:
        return

    def latent() -> dict[str, Array]:
        sites = trace(seed(model, jax.random.key(0))).get_trace(*args, **kwargs)
        return {
            name: site["value"]
            for name, site in sites.items()
            if site["type"] == "sample" and not site["is_observed"]
        }

    shapes = {name: leaf.shape for name, leaf in jax.eval_shape(latent).items()}
    if unknown := sorted(set(start) - set(shapes)):
        raise ValueError(
            f"start names {', '.join(unknown)}: expected sample sites of the model, "
            f"{', '.join(sorted(shapes))}"
        )
    for name, value in start.items():
        if jnp.shape(value) != shapes[name]:
            raise ValueError(
                f"start has {name} of shape {jnp.shape(value)}: expected {shapes[name]}"
            )
    if set(start) != set(shapes):
        return  # the rest is drawn, until the density is positive
    density = jax.jit(lambda values: log_density(model, args, kwargs, values)[0])(start)
    if not np.isfinite(density):
        raise ValueError(
            f"the start has a log density of {float(density)}"
            f"{_infeasible(model, args, kwargs, start)}; "
            "start from smaller couplings or embeddings, or from the prior"
        )


def _infeasible(model: Callable, args: tuple, kwargs: dict, start: Mapping) -> str:
    """How many tokens of attention processes lie outside the feasible region."""
    sites = trace(seed(substitute(model, start), jax.random.key(0))).get_trace(*args, **kwargs)
    outside, smallest = 0, math.inf
    for site in sites.values():
        process = site.get("fn")
        if isinstance(process, dist.ExpandedDistribution):
            process = process.base_dist
        if site["type"] == "sample" and isinstance(process, CausalAttention):
            sign, log_abs = log_det(
                site["value"], process.w_query, process.w_key, bound=process.bound
            )
            outside += int(jnp.sum(sign <= 0))
            smallest = min(smallest, float(jnp.min(sign * jnp.exp(log_abs))))
    if not outside:
        return ""
    return f": {outside} tokens have a determinant <= 0, the smallest of {smallest:.3g}"
