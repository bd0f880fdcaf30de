"""Where the arrays of a fit lie: on one device, or spread over a mesh of devices.

A mesh has two axes. Sequences of a minibatch are spread over both; parameters and the moments of
their optimizer over "fsdp", each along its longest axis that is divisible, and gathered where they
are used (Rajbhandari et al. 2020, arXiv:1910.02054). The compiler places the collectives.
"""

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array
from numpyro.optim import _NumPyroOptim

AXES = ("data", "fsdp")
"""Names of the axes: the second is the one over which parameters are spread."""

_LEAST = 2**10  # numbers on a device, below which an array is not worth spreading


def parse_mesh(text: str) -> dict[str, int]:
    """Read the sizes of the axes, such as "data=2,fsdp=4"; an axis that is left out is 1.

    Raises:
        ValueError: if it is anything else.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d{0,8})\s*", part, re.ASCII)
        if not found or found[1] not in AXES or found[1] in sizes:
            raise ValueError(
                f"mesh is {text!r}: expected data=N, fsdp=N or both, as data=N,fsdp=M, with "
                "numbers of devices >= 1"
            )
        sizes[found[1]] = int(found[2])
    return {name: sizes.get(name, 1) for name in AXES}


class Placement:
    """Where arrays lie; on a mesh of all devices, of this and of other processes, or on one.

    Without a mesh every method returns what it is given, and adds nothing to a program.

    Attributes:
        mesh: None for one device.

    Args:
        mesh: sizes of its axes, see `parse_mesh`; empty for one device.
        batch: sequences of a minibatch.

    Raises:
        ValueError: if the text is no mesh, the mesh has not the devices that there are, or its
            devices do not divide the minibatch.
    """

    def __init__(self, mesh: str = "", *, batch: int = 1) -> None:
        self.mesh: jax.sharding.Mesh | None = None
        if not mesh:
            if jax.distributed.is_initialized() and jax.process_count() > 1:
                raise ValueError(
                    f"{jax.process_count()} processes and no mesh: expected one of all "
                    f"{jax.device_count()} devices, such as data={jax.device_count()}"
                )
            return
        sizes = parse_mesh(mesh)
        count = math.prod(sizes.values())
        if count != jax.device_count():
            raise ValueError(
                f"mesh {mesh} is of {count} devices, and there are {jax.device_count()}: expected "
                "a product of data and fsdp that is this number; CUDA_VISIBLE_DEVICES hides others"
            )
        if batch % count:
            raise ValueError(
                f"fit.batch is {batch} and mesh {mesh} of {count} devices: expected a multiple "
                f"of {count}, since each takes as many sequences as the others"
            )
        automatic = (AxisType.Auto,) * len(AXES)
        self.mesh = jax.make_mesh(tuple(sizes.values()), AXES, axis_types=automatic)

    def context(self) -> AbstractContextManager:
        """Return the context that programs are traced within: see `blocks.per_device`."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def shapes(self, tree: Any) -> Any:
        """Return the shapes of a tree's arrays with their shardings, for compilation."""
        return self._each(
            tree,
            lambda leaf, spread: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread),
        )

    def shardings(self, tree: Any) -> Any:
        """Return shardings of a tree's arrays; None, which leaves them to JAX, without a mesh."""
        return None if self.mesh is None else self._each(tree, lambda _, spread: spread)

    def spread(self, tree: Any) -> Any:
        """Give each device its part of parameters and moments, within a program."""
        return self._each(tree, jax.lax.with_sharding_constraint)

    def gathered(self, tree: Any) -> Any:
        """Give every device the whole of them, within a program; gradients are spread again."""
        return self._each(tree, lambda leaf, _: self._gather(leaf))

    def sequences[T](self, batch: T) -> T:
        """Give each device its own sequences of arrays (B, ...), within a program."""
        if self.mesh is None:
            return batch
        rows = NamedSharding(self.mesh, PartitionSpec(AXES))
        return jax.lax.with_sharding_constraint(batch, rows)

    def put(self, tree: Any) -> Any:
        """Move arrays that every process has whole to where the program wants them."""
        return self._each(
            tree,
            lambda leaf, spread: jax.make_array_from_callback(
                leaf.shape, spread, np.asarray(leaf).__getitem__
            ),
        )

    def fetched(self, tree: Any) -> Any:
        """Return arrays whole, in this process's memory; all processes must ask, at once."""
        return jax.tree.map(_fetched, tree)

    def local(self, tree: Any) -> Any:
        """Return arrays whole, on this process's first device; all processes must ask, at once."""
        return tree if self.mesh is None else jax.tree.map(jnp.asarray, self.fetched(tree))

    def _each(self, tree: Any, of: Callable[[Any, NamedSharding], Any]) -> Any:
        return tree if self.mesh is None else jax.tree.map(lambda a: of(a, self._of(a)), tree)

    def _of(self, leaf: Any) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, spread_along(leaf.shape, self.mesh.shape["fsdp"]))

    def _gather(self, leaf: Array) -> Array:
        assert self.mesh is not None
        whole, spread = NamedSharding(self.mesh, PartitionSpec()), self._of(leaf)

        @jax.custom_vjp
        def gather(leaf: Array) -> Array:
            return jax.lax.with_sharding_constraint(leaf, whole)

        # By itself JAX would want the gradient whole on every device.
        gather.defvjp(
            lambda leaf: (gather(leaf), None),
            lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, spread),),
        )
        return gather(leaf)


class PlacedOptimizer(_NumPyroOptim):
    """An optimizer of NumPyro's SVI whose parameters and moments are spread over a mesh.

    Args:
        optimizer: optimizer of the steps; it treats every number on its own, or sums over all.
        placement: placement on a mesh.
    """

    def __init__(self, optimizer: _NumPyroOptim, placement: Placement) -> None:
        self._optimizer, self._placement = optimizer, placement
        functions = optimizer.init_fn, optimizer.update_fn, optimizer.get_params_fn
        super().__init__(lambda: functions)

    def eval_and_update(
        self,
        fn: Callable[[Any], tuple],
        state: tuple[Array, Any],
        forward_mode_differentiation: bool = False,
    ) -> tuple[tuple[Array, Any], tuple[Array, Any]]:
        """Return loss and auxiliary output at the gathered parameters; the state, spread."""
        loss, state = self._optimizer.eval_and_update(
            lambda params: fn(self._placement.gathered(params)),
            state,
            forward_mode_differentiation,
        )
        return loss, self._placement.spread(state)


def spread_along(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """Tell how an array lies on devices of "fsdp": along its longest axis that they divide.

    Arrays of fewer than 1024 numbers a device, such as gains, and those that no axis of which is
    divisible lie whole on every device.
    """
    axes = [axis for axis, size in enumerate(shape) if size % devices == 0]
    if devices == 1 or not axes or math.prod(shape) < _LEAST * devices:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * longest, "fsdp")


def _fetched(leaf: Array) -> np.ndarray:
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
