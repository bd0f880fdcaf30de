"""Chains of a sampler, compiled once and advanced by any number of iterations.

Where there are several devices, chains run on all of them: chain i of method parallel on device i
modulo their number, those of method vectorized in equal parts.
"""

import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from probattn.inference.config_sampling import SampleConfig
from probattn.inference.runs.checkpoints import named_leaves, with_leaves
from probattn.inference.runtime.memory import gibibytes
from probattn.inference.sampling.initialisation import check_initial_values
from probattn.inference.sampling.kernel import Kernel
from probattn.inference.sampling.lookahead import run_ahead
from probattn.inference.sampling.mclmc import mclmc_kernel
from probattn.inference.sampling.nuts_kernel import nuts_kernel
from probattn.inference.sampling.stochastic import stochastic_kernel
from probattn.inference.sampling.subsampling import check_contents, contents, indexable

CALL_SECONDS = 2.0  # seconds of all chains between two updates of a progress bar
_ITERATIONS, _VALUES = 400, 2**24  # most iterations of a call, most numbers in its buffers
_CALLS_AHEAD = 4  # calls that a chain may have begun before the caller has the first of them
_LARGEST = 16 * 2**30  # bytes of all draws

KERNELS: Mapping[str, Callable[..., Kernel]] = {
    "nuts": nuts_kernel,
    "mclmc": mclmc_kernel,
    "ensemble": mclmc_kernel,
    "sghmc": stochastic_kernel,
    "sgld": stochastic_kernel,
}


class SampleError(RuntimeError):
    """A sampler cannot start or go on: the message says why, and what to try."""


class Iterations(NamedTuple):
    """Iterations of all chains, one after another; every array is (chains, iterations, ...)."""

    draws: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]


class _Call(NamedTuple):
    """What one call gives back; of the compiled program, buffers whose first rows are filled."""

    state: Any
    draws: dict[str, Any]
    statistics: dict[str, Any]


class Chains:
    """The compiled kernel of a model, and the state of all chains.

    Args:
        model: a NumPyro model.
        arguments: its arguments and keyword arguments.
        config: chains, warm-up, seed and method.
        init_values: values of sample sites that every chain starts from, of method ensemble those
            of each chain along a first axis; other sites start from a draw of the prior.

    Raises:
        ValueError: if `init_values` names a site that the model lacks, or has density zero, or the
            model has no latent site.
        SampleError: if a chain finds no start of positive density with a finite gradient.
    """

    def __init__(
        self, model: Callable, arguments: Sequence, config: SampleConfig, init_values: Mapping
    ) -> None:
        self._config = config
        if config.is_stochastic:
            arguments = indexable(tuple(arguments))
        found = contents(model, arguments)
        check_contents(found, config)
        check_initial_values(
            model,
            arguments,
            {name: site.shape for name, site in found.latent.items()},
            init_values,
            chains=config.chains if config.method == "ensemble" else None,
            density=not config.is_stochastic,  # which is that of all the data, and computed below
        )
        kernel = KERNELS[config.method](model, arguments, config, init_values)

        def advance(state: Any, count: Array) -> _Call:
            def recorded(state: Any) -> tuple[dict, dict]:
                return kernel.draw(state), kernel.statistics(state)

            def body(i: Array, carry: tuple) -> tuple:
                state, buffers = carry
                state = kernel.step(state)
                buffers = jax.tree.map(
                    lambda rows, row: rows.at[i].set(row), buffers, recorded(state)
                )
                return state, buffers

            shapes = jax.eval_shape(recorded, state)
            empty = jax.tree.map(
                lambda leaf: jnp.zeros((self._most, *leaf.shape), leaf.dtype), shapes
            )
            state, (draws, statistics) = jax.lax.fori_loop(0, count, body, (state, empty))
            return _Call(state, draws, statistics)

        keys = jax.random.split(jax.random.key(config.seed), config.chains)
        numbers = jnp.arange(config.chains)
        starts = jax.jit(jax.vmap(kernel.init)).trace(keys, numbers)
        size = sum(leaf.size for leaf in jax.tree.leaves(kernel.position(starts.out_info)))
        _check_size(size, config)
        self._most = max(1, min(_ITERATIONS, _VALUES // size))
        state = jax.block_until_ready(starts.lower().compile()(keys, numbers))
        _check_starts(jax.vmap(kernel.statistics)(state)["lp"], kernel.gradient(state), init_values)
        self._each = config.chain_method == "parallel"
        devices = jax.local_devices()[: config.chains]
        self._spread = None if self._each else _spread(config.chains, devices)
        self._devices = devices if self._each else devices[:1]
        # States of single chains, or one of all chains; each is advanced by itself.
        self._states = self._placed(state)
        of_all = advance
        if not self._each:
            of_all = jax.vmap(advance, in_axes=(0, None))
            if self._spread is not None:
                of_all = _for_own_chains(of_all, self._spread)
        # The same program for each device: a chain has the same draws on any of them.
        self._programs = [
            jax.jit(of_all).lower(state, np.int32(0)).compile()
            for state in self._states[: len(self._devices)]
        ]

    def advance(self, first: int, stops: Sequence[int]) -> Generator[Iterations]:
        """Iterate all chains, from iteration `first` to the last of `stops`.

        A chain has a thread of its own and does not wait for slower chains, but goes a few calls
        ahead of them. What all chains have done is given at once, and no part crosses one of
        `stops`. Closing the iterator waits for the calls in progress, and leaves the chains where
        the part that was given last ended.
        """
        threads = min(len(self._states), os.cpu_count() or 1)
        latest = list(self._states)
        pace = CallLength(first, stops, self._most, len(latest), threads)

        def work(chain: int, count: int) -> _Call:
            # Every thread has JAX settings of its own.
            with jax.enable_x64(self._config.precision == "float64"):
                started = time.perf_counter()
                program = self._programs[chain % len(self._programs)]
                call = jax.block_until_ready(program(latest[chain], np.int32(count)))
                pace.took(chain, count, time.perf_counter() - started)
            latest[chain] = call.state
            # Copied: a view would keep the whole buffer.
            filled = (None, slice(count)) if self._each else (slice(None), slice(count))
            draws, statistics = jax.tree.map(
                lambda rows: np.asarray(rows)[filled].copy(), (call.draws, call.statistics)
            )
            return _Call(call.state, draws, statistics)

        rounds = run_ahead(
            work,
            pace.next,
            chains=len(latest),
            threads=threads,
            ahead=_CALLS_AHEAD if self._each else 1,
        )
        with closing(rounds):
            for calls in rounds:
                self._states = [call.state for call in calls]
                yield Iterations(
                    *jax.tree.map(
                        lambda *parts: np.concatenate(parts),
                        *[(call.draws, call.statistics) for call in calls],
                    )
                )

    def saved(self) -> dict[str, np.ndarray]:
        """Return the leaves of the state of all chains by name, each (chains, ...)."""
        states = [jax.tree.map(np.asarray, _plain(state)) for state in self._states]
        if self._each:
            return named_leaves(jax.tree.map(lambda *leaves: np.stack(leaves), *states))
        return named_leaves(states[0])

    def restore(self, leaves: Mapping[str, np.ndarray]) -> None:
        """Go on from leaves of a state that was saved, of the names and shapes of `saved`."""
        first = self._states[0]
        plain = with_leaves(
            _plain(first), {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
        )
        self._states = self._placed(
            jax.tree.map(
                lambda old, new: jax.random.wrap_key_data(new) if _is_key(old) else new,
                first,
                plain,
            )
        )

    def _placed(self, state: Any) -> list[Any]:
        """Divide a state of all chains into those that are advanced, on their devices."""
        if not self._each:
            return [state if self._spread is None else jax.device_put(state, self._spread)]
        chains = _each_of(state, self._config.chains)
        if len(self._devices) == 1:
            return chains
        return [
            jax.device_put(chain, self._devices[number % len(self._devices)])
            for number, chain in enumerate(chains)
        ]


class CallLength:
    """Iterations of each call: few at first, then so many that a round takes `CALL_SECONDS`.

    The slowest chain sets the pace. A round takes `CALL_SECONDS` if all chains are as slow. Until
    the slowest chain has made a call of that length, no call is much longer than its last.

    Args:
        first: iteration before them.
        stops: iterations that no call goes across; the last ends them.
        most: most iterations of one call.
        chains: number of chains; 1 where one call advances all of them.
        threads: number of threads that share them.
    """

    def __init__(
        self, first: int, stops: Sequence[int], most: int, chains: int, threads: int
    ) -> None:
        self._at, self._stops, self._most = first, stops, most
        # Iterations of each chain's last call, and seconds of an iteration in it.
        self._counts, self._seconds = [0] * chains, [0.0] * chains
        self._turns = chains / threads
        self._count = 0

    def next(self, number: int) -> int | None:
        """Return the iterations of the next call; None if there is none."""
        stop = next((stop for stop in self._stops if stop > self._at), None)
        if stop is None:
            return None
        wanted = min(2 * self._count, 4 * min(self._counts), self._most)
        if slowest := max(self._seconds):
            wanted = min(wanted, round(CALL_SECONDS / (slowest * self._turns)))
        self._count = max(1, wanted)
        count = min(self._count, stop - self._at)
        self._at += count
        return count

    def took(self, chain: int, count: int, seconds: float) -> None:
        """Note the seconds of a call, from any thread."""
        self._counts[chain], self._seconds[chain] = count, seconds / count


@partial(jax.jit, static_argnums=1)
def _each_of(state: Any, chains: int) -> list[Any]:
    return [jax.tree.map(itemgetter(number), state) for number in range(chains)]


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(state: Any) -> Any:
    """Return the state with its random keys as numbers, which can be saved."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def _check_starts(lp: Array, gradient: Any, init_values: Mapping) -> None:
    """Refuse chains whose start has no finite log density or gradient: they would stay there."""
    usable = np.isfinite(lp)
    for leaf in jax.tree.leaves(gradient):
        usable = usable & np.isfinite(leaf).reshape(len(usable), -1).all(1)
    if not usable.all():
        lost = [str(number) for number in np.flatnonzero(~usable)]
        rest = " with the initial values" if init_values else ""
        raise SampleError(
            f"chain {', '.join(lost)}: 100 draws of the prior{rest} have no finite density or "
            "gradient; start from given values, such as a coupling of zero, use a proper coupling, "
            "or write the model so that its gradient is finite"
        )


def _spread(chains: int, devices: Sequence[jax.Device]) -> NamedSharding | None:
    """Place chains equally on as many devices as there can be; None if that is one device."""
    count = next(n for n in range(len(devices), 0, -1) if chains % n == 0)
    if count == 1:
        return None
    return NamedSharding(Mesh(np.array(devices[:count]), ("chains",)), PartitionSpec("chains"))


def _for_own_chains(advance: Callable, spread: NamedSharding) -> Callable:
    """Let every device `advance` its own chains: none waits for those of another."""
    return jax.shard_map(
        advance,
        mesh=spread.mesh,
        in_specs=(spread.spec, PartitionSpec()),
        out_specs=spread.spec,
        check_vma=False,  # branches may return constants beside results
    )


def _check_size(size: int, config: SampleConfig) -> None:
    """Refuse draws that no memory holds, or of nothing, before anything is compiled."""
    if size == 0:
        raise ValueError(
            "the model has no latent sample site, or none with a number in it: expected one at "
            "least; what is observed or deterministic needs no sampling"
        )
    total = size * config.draws * jnp.dtype(config.precision).itemsize
    if total > _LARGEST:
        raise ValueError(
            f"{config.draws} draws of {config.chains} chains of {size // config.chains:,} numbers "
            f"take {gibibytes(total)}: expected at most {gibibytes(_LARGEST)}; give a smaller "
            "model, or fewer sample.draws"
        )
