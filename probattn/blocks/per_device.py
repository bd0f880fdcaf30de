"""Functions of each sequence on its own, on the devices over which sequences are spread."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array


def per_device[R](function: Callable[..., R], *arrays: Array) -> R:
    """Let every device of JAX's mesh compute `function(*arrays)` for its own sequences.

    Loops and conditions over sequences would otherwise gather them on every device. Nothing changes
    where no mesh is set (`jax.set_mesh`), where its axes are not left to the compiler, and where
    its devices do not divide the sequences.

    Args:
        function: function of arrays whose first axis is that of the sequences, N, to such arrays; a
            sequence's results depend on it alone.
        arrays: its arguments, each (N, ...).
    """
    mesh = jax.sharding.get_abstract_mesh()
    spread: Any = function
    if (
        mesh.size > 1
        and all(kind == AxisType.Auto for kind in mesh.axis_types)
        and len(arrays[0]) % mesh.size == 0
    ):
        rows = PartitionSpec(mesh.axis_names)
        # Branches that return constants beside branches that return results are no error here.
        spread = jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)
    return spread(*arrays)
