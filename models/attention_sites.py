"""Deterministic sites that tell coupling and margins of an attention stage, in any model."""

import jax.numpy as jnp
import numpyro
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from probattn import certificate, log_det, stability_margin, table_certificate

_MOST_ROWS = 2048  # of a table that is certified for every draw


def record_coupling(matrix: Float[Array, "*heads d d"]) -> Float[Array, "*heads d d"]:
    """Record "coupling", A, and what no rotation of the embeddings changes, deterministic sites.

    "coupling_trace" and "coupling_norm" (Frobenius), (...), and "coupling_eigenvalues" (..., d),
    those of A + A^T in increasing order.
    """
    symmetric = matrix + jnp.swapaxes(matrix, -1, -2)
    numpyro.deterministic("coupling_trace", jnp.trace(matrix, axis1=-2, axis2=-1))
    numpyro.deterministic("coupling_norm", jnp.linalg.norm(matrix, axis=(-2, -1)))
    numpyro.deterministic("coupling_eigenvalues", jnp.linalg.eigvalsh(symmetric))
    return numpyro.deterministic("coupling", matrix)


def record_margins(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, bound: ArrayLike | None
) -> None:
    """Record "log_det", "margin" and "certificate", each (..., T), as deterministic sites.

    log_det is in nats, and -inf where the determinant is not positive; the margin is of kind
    "sigma_min". No density depends on them: under `jax.jit` they cost nothing but where asked for.

    Args:
        x: embeddings (..., T, d).
        w_query: W_Q (..., d, r).
        w_key: W_K (..., d, r).
        bound: c of a bounded context, or None.
    """
    sign, log_abs = log_det(x, w_query, w_key, bound=bound)
    numpyro.deterministic("log_det", jnp.where(sign > 0, log_abs, -jnp.inf))
    numpyro.deterministic("margin", stability_margin(x, w_query, w_key, bound=bound))
    numpyro.deterministic("certificate", certificate(x, w_query, w_key, bound=bound))


def record_table_certificate(
    table: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    bound: ArrayLike | None,
    position: ArrayLike,
) -> None:
    """Record "table_certificate", rho of all texts, and "no_text_folds", 1 where it is below 1.

    Both are deterministic sites (...), see `probattn.table_certificate`. Of a table of more than
    2048 rows, which would take long for every draw, nothing is recorded.

    Args:
        table: every token that the stage may see (N, d).
        w_query: W_Q (..., d, r).
        w_key: W_K (..., d, r).
        bound: c of a bounded context, or None.
        position: (N,) integers; two rows of equal position never stand in one past.
    """
    if jnp.shape(table)[0] > _MOST_ROWS:
        return
    rho = table_certificate(table, w_query, w_key, bound=bound, position=position).rho
    numpyro.deterministic("table_certificate", rho)
    numpyro.deterministic("no_text_folds", (rho < 1).astype(jnp.int32))
