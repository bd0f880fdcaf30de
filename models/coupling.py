"""Couplings A of an attention process: priors that are proper by construction, or free.

Each is invariant under rotations of the embedding space, A -> R^T A R: where the embeddings are
identified only up to one, the prior must not choose among them.
"""

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float

from probattn.models.attention_sites import record_coupling

Coupling = Literal["repulsive", "bounded", "free"]

# An accelerator's shorter products would leave the proper regime where weights are large.
_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def sample_coupling(
    kind: Coupling, width: int, bound: float | None, *, unit: float = 1.0
) -> Float[Array, "d d"]:
    """Sample the coupling A.

    "repulsive": A = K - L L^T with K antisymmetric and L L^T a Wishart matrix, so that A + A^T is
    negative semidefinite. "bounded": A = (I - d / (d + 1) L L^T + K / sqrt(d + 1)) / c^2 with the
    same L and K. With S the symmetric part of A, every A with c^2 lambda_max(S) < 1 is reached, and
    no other: this is all that is proper for every bounded context, but for the boundary (see
    `probattn.is_proper`). The entries of c^2 A have mean zero and variance 2 / (d + 1), and are
    uncorrelated, so attraction and repulsion are of one size and the norm of c^2 A does not grow
    with d. The density of S is proportional to exp((d + 1) c^2 tr(S) / 2) up to the boundary, where
    it does not vanish. "free": the entries of A are Normal, as the paper leaves them, and no
    context of unlimited spread is safe.

    Sample sites: "repulsion" (d, d), L, and "rotation" (d (d - 1) / 2,), the lower triangle of K,
    which d = 1 has not; "free_coupling" (d, d). Deterministic sites: those of
    `attention_sites.record_coupling`.

    Args:
        kind: kind of prior.
        width: d.
        bound: c, for "bounded", in the given unit.
        unit: unit of the embeddings; A is what it would be in units of one, divided by unit^2.

    Raises:
        ValueError: if the coupling is "bounded" and the bound is None.
    """
    normal = dist.Normal(0.0, 1.0)
    if kind == "free":
        scale = 1 / math.sqrt(width)
        free = dist.Normal(0.0, scale).expand((width, width)).to_event(2)
        return record_coupling(numpyro.sample("free_coupling", free) / unit**2)
    # The mean of L L^T is (d + 1) / d times the identity.
    repulsion = dist.WishartCholesky(width + 1.0, scale_tril=jnp.eye(width) / math.sqrt(width))
    factor = numpyro.sample("repulsion", repulsion)
    symmetric = -_matmul(factor, factor.T)
    turn = jnp.zeros_like(symmetric)
    if width > 1:
        lower = jnp.tril_indices(width, -1)
        entries = numpyro.sample("rotation", normal.expand((len(lower[0]),)).to_event(1))
        turn = turn.at[lower].set(entries).at[lower[::-1]].set(-entries)
    if kind == "repulsive":
        return record_coupling((symmetric + turn) / unit**2)
    if bound is None:
        raise ValueError("bound is None: expected a number > 0 for the coupling 'bounded'")
    symmetric = jnp.eye(width) + symmetric * (width / (width + 1))
    return record_coupling((symmetric + turn / math.sqrt(width + 1)) / (bound * unit) ** 2)


def attention_weights_of(
    coupling: Float[Array, "d d"],
) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """Return W_Q and W_K (d, d), of full rank r = d, with W_K W_Q^T / sqrt(d) = A."""
    width = coupling.shape[0]
    return jnp.eye(width, dtype=coupling.dtype), math.sqrt(width) * coupling


def proper_weights(
    w_query: Float[Array, "d r"], w_key: Float[Array, "d r"], *, bound: float | None
) -> tuple[Float[Array, "d r"], Float[Array, "d r"]]:
    """Make W_Q and W_K (d, r), proper for every context, out of any two matrices.

    Without a bound W_K becomes W_Q (N - I) with the antisymmetric N = W_Q^T W_K - W_K^T W_Q, so
    that A + A^T = -2 W_Q W_Q^T / sqrt(r) is negative semidefinite. With a bound c both become T W,
    and A = T W_K W_Q^T T / c^2. T is a positive definite function of S, the symmetric part of W_K
    W_Q^T, see `_attenuation`: an eigenvalue s of S becomes s / (1 + s_+) of the symmetric part of
    c^2 A, where s_+ = (s + sqrt(s^2 + 4)) / 2 is a smooth positive part of s. It grows from minus
    infinity to one, so every A of rank r with c^2 lambda_max((A + A^T) / 2) < 1 is reached, and no
    other.
    """
    if bound is None:
        identity = jnp.eye(w_query.shape[-1], dtype=w_query.dtype)
        turn = _matmul(w_query.T, w_key)
        return w_query, _matmul(w_query, turn - turn.T - identity)
    share = w_query.shape[-1] ** 0.25 / bound  # A carries 1 / sqrt(r)
    attenuation = _attenuation(w_query, w_key)
    return share * _matmul(attenuation, w_query), share * _matmul(attenuation, w_key)


def capped_weights(
    w_query: Float[Array, "d r"],
    w_key: Float[Array, "d r"],
    *,
    reach: Float[Array, ""],
    cap: float,
) -> tuple[Float[Array, "d r"], Float[Array, "d r"]]:
    """Shrink W_Q and W_K (d, r) until nothing within a reach c folds their attention.

    Both are divided by sqrt(1 + rho / cap), with rho the bound of c^2 lambda_max((A + A^T) / 2) by
    `_largest_attraction` for the coupling A of the matrices given. So rho becomes
    rho / (1 + rho / cap) < cap. A coupling that attracts or repels little stays nearly as it is.
    What repels strongly is reduced, since a share of it counts as attraction. Every direction of A
    is kept.

    Rounding is paid for. With n = c^2 |W_Q| |W_K| / sqrt(r) in Frobenius norms and m = min(d, r),
    (640 + 4 d + 64 r) eps n is added to rho, and then (16 m + 64 + 4 (d + 16) sqrt(m)) eps rho.
    So `probattn.table_certificate` is at most the cap in floating point too, for every table of
    which no two rows are more than 2 c apart, and `probattn.is_proper` holds for the bound c.

    Args:
        w_query: W_Q.
        w_key: W_K.
        reach: c, at least half of the distance of any two tokens of a past, >= 0.
        cap: what the certificate stays below, in (0, 1).
    """
    width, rank = w_query.shape
    least, eps = min(width, rank), float(jnp.finfo(w_query.dtype).eps)
    # A matrix of zeros has a derivative, and a length that is not zero.
    lengths = [jnp.sqrt(jnp.sum(w**2) + float(jnp.finfo(w.dtype).tiny)) for w in (w_query, w_key)]
    size = reach**2 * lengths[0] * lengths[1] / math.sqrt(rank)
    attraction = _largest_attraction(w_query / lengths[0], w_key / lengths[1])
    rho = size * (attraction + (640 + 4 * width + 64 * rank) * eps)
    rho = rho * (1 + (16 * least + 64 + 4 * (width + 16) * math.sqrt(least)) * eps)
    shrink = jax.lax.rsqrt(1 + rho / cap)
    return shrink * w_query, shrink * w_key


_SQUARINGS = 10


def _largest_attraction(
    w_query: Float[Array, "d r"], w_key: Float[Array, "d r"]
) -> Float[Array, ""]:
    """Bound the largest eigenvalue of S, the symmetric part of W_K W_Q^T, for |W| = 1 each.

    By products of (2 r, 2 r) matrices and a Cholesky decomposition alone, which accelerators do
    fast, and with derivatives of every order. With B = [W_K, W_Q] and J the matrix that exchanges
    the halves of a vector, S = B J B^T / 2. Let L L^T = B^T B + epsilon I. Then N = L^T J L / 2 has
    the nonzero eigenvalues of a matrix of which S is a corner, so its largest one is not smaller.
    It lies below tr((N + s I)^p)^(1/p) - s, where s = tr(N^8)^(1/8) >= |N|_2 and p = 2^10: by at
    most 2 s ((2 r)^(1/p) - 1), 0.68 % of s at r = 16.
    """
    width, rank = w_query.shape
    eps = float(jnp.finfo(w_query.dtype).eps)
    both = jnp.concatenate([w_key, w_query], axis=-1)
    identity = jnp.eye(2 * rank, dtype=both.dtype)
    # Larger than the rounding of the product and of its decomposition.
    lower = jnp.linalg.cholesky(_matmul(both.T, both) + (16 * rank + width) * eps * identity)
    half = _matmul(lower[:rank].T, lower[rank:]) / 2
    matrix = half + half.T
    length = jnp.linalg.norm(matrix)
    matrix = matrix / length
    square = _matmul(matrix, matrix)
    shift = jnp.sum(_matmul(square, square) ** 2) ** 0.125
    power, logarithm = matrix + shift * identity, jnp.zeros_like(length)
    for number in range(_SQUARINGS + 1):
        trace = jnp.trace(power)
        logarithm += jnp.log(trace) / 2**number
        if number < _SQUARINGS:
            power = power / trace
            power = _matmul(power, power)
    return length * (jnp.exp(logarithm) - shift)


@jax.custom_jvp
def _attenuation(w_query: Float[Array, "d r"], w_key: Float[Array, "d r"]) -> Float[Array, "d d"]:
    """Return T = (I + S_+)^(-1/2), with S the symmetric part of W_K W_Q^T and S_+ as above.

    S_+ - S_+^-1 = S, so T^-2 - (I - T^2)^-1 = S. The derivative is that of this equation, since
    that of an eigendecomposition is singular at equal eigenvalues, and that of a QR decomposition
    where [W_Q, W_K] is not of full rank.
    """
    vectors, roots, _ = _attenuated_directions(w_query, w_key)
    return _REST * jnp.eye(len(vectors), dtype=roots.dtype) + _matmul(
        vectors * (roots - _REST), vectors.T
    )


_REST = math.sqrt(0.5)  # the eigenvalue of T where that of S is zero


def _attenuated_directions(
    w_query: Float[Array, "d r"], w_key: Float[Array, "d r"]
) -> tuple[Float[Array, "d m"], Float[Array, "1 m"], Float[Array, "1 m"]]:
    """Return eigenvectors in the span of [W_Q, W_K], with their eigenvalues of T and of S_+."""
    rank = w_query.shape[-1]
    basis, core = jnp.linalg.qr(jnp.concatenate([w_query, w_key], axis=-1))
    product = _matmul(core[:, rank:], core[:, :rank].T)
    values, vectors = jnp.linalg.eigh((product + product.T) / 2)
    positive = jnp.exp(jnp.arcsinh(values / 2))[None]
    return _matmul(basis, vectors), 1 / jnp.sqrt(1 + positive), positive


@_attenuation.defjvp
def _attenuation_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    root = _attenuation(*primals)
    square = _matmul(root, root)
    change, slope = jax.jvp(_symmetric_product, primals, tangents)
    # S_+^-1 = I - T^2 S. With dM = T dT + dT T the derivative of the equation that defines T is
    # dM + S_+^-1 dM S_+^-1 = -T^2 dS T^2. JAX differentiates this again where it is asked to.
    inverse = jnp.eye(len(root), dtype=root.dtype) - _matmul(square, change)
    inverse = (inverse + inverse.T) / 2

    def operator(tangent: Array) -> Array:
        of_square = _matmul(root, tangent) + _matmul(tangent, root)
        return of_square + _matmul(_matmul(inverse, of_square), inverse)

    vectors, roots, positive = _attenuated_directions(*jax.lax.stop_gradient(primals))

    def factor(row: Array | float, column: Array | float, product: Array | float) -> Any:
        """Divide by the eigenvalue of a pair, given t of both and the product of their s_+."""
        return product / ((row + column) * (1 + product))

    outside, across = factor(_REST, _REST, 1.0), factor(roots, _REST, positive)
    inside = factor(roots.T, roots, positive.T * positive)

    def solve(_: Any, right: Array) -> Array:
        """Divide in the basis of the eigenvectors; outside of their span T is _REST."""
        rows = _matmul(vectors.T, right)
        columns = _matmul(right, vectors) * (across - outside)
        both = (inside - across - across.T + outside) * _matmul(rows, vectors)
        rows = (across - outside).T * rows + _matmul(both, vectors.T)
        return outside * right + _matmul(vectors, rows) + _matmul(columns, vectors.T)

    right = -_matmul(_matmul(square, slope), square)
    return root, jax.lax.custom_linear_solve(operator, right, solve, symmetric=True)


def _symmetric_product(
    w_query: Float[Array, "d r"], w_key: Float[Array, "d r"]
) -> Float[Array, "d d"]:
    product = _matmul(w_key, w_query.T)
    return (product + product.T) / 2
