"""One registry of named inputs, shared by every test of the mathematics.

`make(case, dtype)` is deterministic. Shapes are few on purpose: JAX compiles once for each, and
`evaluated` computes all cases of one shape at once.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe for one sequence and one pair of matrices.

    Attributes:
        name: shown as the test's id.
        length: T.
        width: d.
        rank: r.
        scale: standard deviation of the embeddings.
        seed: of NumPy's generator.
        kind: which recipe; see `_build`.
        target: signed smallest singular value wanted of D at `SINGULAR_POSITION`, for the kind
            "near_singular".
    """

    name: str
    length: int
    width: int
    rank: int
    scale: float = 1.0
    seed: int = 0
    kind: str = "random"
    target: float = 0.0

    def __str__(self):
        return self.name


# The one position whose block is steered to the boundary: it has tokens before and after it.
SINGULAR_POSITION = 4
OFFSET = 1e3

SCALAR = (6, 1, 1)
RANK_ONE = (6, 4, 1)
THIN = (6, 5, 2)
SQUARE = (6, 3, 3)
WIDE = (6, 2, 4)
SHAPES = {"scalar": SCALAR, "rank_one": RANK_ONE, "thin": THIN, "square": SQUARE, "wide": WIDE}


def _registry():
    cases = [
        Case("length_1", 1, 4, 2),
        Case("length_2", 2, 4, 2),
        Case("scalar_tied_logits", *SCALAR, kind="tied"),
    ]
    for number, (label, shape) in enumerate(SHAPES.items()):
        cases += [
            Case(f"{label}", *shape, seed=10 + number),
            Case(f"{label}_attractive", *shape, scale=0.7, seed=20 + number, kind="attractive"),
            Case(f"{label}_repulsive", *shape, seed=30 + number, kind="repulsive"),
            Case(f"{label}_scale_1e-3", *shape, scale=1e-3, seed=40 + number),
            Case(f"{label}_scale_3", *shape, scale=3.0, seed=50 + number),
            Case(f"{label}_scale_30", *shape, scale=30.0, seed=50 + number),
            Case(f"{label}_folded", *shape, seed=140 + number, kind="near_singular", target=-0.1),
        ]
    steered = [
        ("scalar", 1e-2),
        ("rank_one", -1e-3),
        ("square", -1e-4),
        ("thin", 1e-5),
        ("wide", -1e-6),
        ("scalar", -1e-7),
        ("thin", 1e-8),
        ("square", -1e-8),
    ]
    for number, (label, target) in enumerate(steered):
        recipe = {"seed": 120 + number, "kind": "near_singular", "target": target}
        cases.append(Case(f"{label}_margin_{target:.0e}", *SHAPES[label], **recipe))
    return [
        *cases,
        Case("thin_repeated_tokens", *THIN, seed=80, kind="repeated"),
        Case("square_all_equal", *SQUARE, seed=81, kind="all_equal"),
        Case("scalar_offset", *SCALAR, scale=30.0, seed=82, kind="offset"),
        Case("thin_offset", *THIN, seed=83, kind="key_offset"),
        Case("square_one_hot", *SQUARE, seed=84, kind="one_hot"),
        Case("square_twice_folded", *SQUARE, seed=85, kind="twice_folded"),
        Case("wide_twice_folded", *WIDE, seed=86, kind="twice_folded"),
    ]


CASES = _registry()
BY_NAME = {case.name: case for case in CASES}

# One block exactly singular, in floating-point arithmetic too: apart, because no log-determinant
# is finite there.
SINGULAR_CASES = [
    Case("scalar_singular", *SCALAR, kind="singular"),
    Case("wide_singular", *WIDE, kind="singular"),
    Case("wide_twice_singular", *WIDE, kind="twice_singular"),
]

# More positions than any block of rows that an implementation may work in.
LONG_CASE = Case("long", 100, 3, 2, seed=95)

# Of the size that a user trains, for float32: unit embeddings, covariance of order one.
LARGE = (64, 64, 32)
LARGE_CASES = [
    Case("large", *LARGE, seed=90),
    Case("large_attractive", *LARGE, seed=91, kind="attractive"),
    Case("large_repulsive", *LARGE, seed=92, kind="repulsive"),
]


REGISTERED = CASES + SINGULAR_CASES
# One test for each shape, and the name of the case in its message.
SHAPE_IDS = {
    "one_token": (1, 4, 2),
    "two_tokens": (2, 4, 2),
    "scalar": SCALAR,
    "thin": THIN,
    "square": SQUARE,
    "wide": WIDE,
    "rank_one": RANK_ONE,
}


def shapes(*slow):
    """Parametrise a test by the shapes of the registry, of which some make it slow."""
    parameters = [
        pytest.param(shape, id=name, marks=[pytest.mark.slow] if name in slow else [])
        for name, shape in SHAPE_IDS.items()
    ]
    return pytest.mark.parametrize("shape", parameters)


every_shape = shapes("rank_one", "two_tokens", "square")
# Where the program is large, or is compiled a second time for single precision.
main_shapes = shapes("rank_one", "one_token", "two_tokens", "square", "scalar")


def of_shape(shape, cases=None):
    """Cases of one shape, (T, d, r): by default all that are registered."""
    cases = REGISTERED if cases is None else cases
    return [case for case in cases if (case.length, case.width, case.rank) == shape]


def stacked(cases, dtype=np.float64):
    """Inputs of several cases of one shape, each with one axis more in front."""
    return tuple(
        np.stack(part) for part in zip(*(make(case, dtype) for case in cases), strict=True)
    )


@functools.cache
def evaluated(function, shape, dtype=np.float64):
    """What a compiled function returns for each registered case of a shape.

    Args:
        function: of stacked x, w_query and w_key; jitted, and mapped where it takes one sequence.
        shape: T, d and r.
        dtype: of the inputs.

    Returns:
        A dictionary from cases to NumPy arrays, or to tuples of them.
    """
    cases = of_shape(shape)
    found = jax.tree.map(np.asarray, function(*stacked(cases, dtype)))
    return {case: jax.tree.map(lambda part, n=n: part[n], found) for n, case in enumerate(cases)}


def make(case, dtype=np.float64):
    """Inputs of a case.

    Args:
        case: a `Case`.
        dtype: float32 inputs are the float64 ones rounded.

    Returns:
        x of shape (T, d), w_query and w_key of shape (d, r): NumPy arrays.
    """
    return tuple(array.astype(dtype) for array in _build(case))


@functools.cache
def _build(case):
    rng = np.random.default_rng(case.seed)
    shape = (case.width, case.rank)
    x = case.scale * rng.standard_normal((case.length, case.width))
    # Unit queries for unit tokens, so that the coupling and the covariance are of order one.
    w_query = rng.standard_normal(shape) / np.sqrt(case.width)
    w_key = rng.standard_normal(shape) / np.sqrt(case.width)
    match case.kind:
        case "random":
            pass
        case "attractive":
            w_key = w_query
        case "repulsive":
            w_key = -w_query
        case "tied":
            x[:, 0] = [-4.0, 4.0, 0.0, 0.0, 0.0, 0.0]
            w_query, w_key = np.array([[0.3]]), np.array([[1.0]])
        case "repeated":
            x[:4] = x[0]
        case "all_equal":
            x[:] = x[0]
        case "offset":
            # Smaller matrices, so that the logits still differ by about one.
            x = x + OFFSET
            w_query, w_key = (w / np.sqrt(OFFSET * case.scale) for w in (w_query, w_key))
        case "key_offset":
            # A common vector that the queries do not see: the softmax and the covariance are
            # those of the sequence without it.
            x = x + OFFSET * np.linalg.svd(w_query)[0][:, -1]
        case "one_hot":
            w_query, w_key = 300 * w_query, 300 * w_key
        case "near_singular":
            # A noisy copy of one matrix: attractive, but not symmetric; and a short query, so that
            # the weights stay spread while the coupling grows until it meets the boundary.
            x[SINGULAR_POSITION] *= 0.1
            w_key = w_query + 0.2 * w_key
            w_query = w_query * _strength(x, w_query, w_key, case.target)
        case "singular":
            # Position 2 has Sigma = diag(16, 0, …) and A = I/16.
            x[:3] = 0.0
            x[0, 0], x[1, 0] = -4.0, 4.0
            w_query, w_key = _exact_coupling(1 / 16, shape)
        case "twice_singular":
            # Position 4 has Sigma = 8 I and A = I/8, in two dimensions: a block of zeros.
            x[:5] = 4.0 * np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]])
            w_query, w_key = _exact_coupling(1 / 8, shape)
        case "twice_folded":
            # Near-uniform weights on ± 4 along each of two axes: Sigma is about 8 on both.
            x[:4, :2] = 4 * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]) + 0.1 * x[:4, :2]
            x[:4, 2:] *= 0.1
            x[4] *= 0.1
            w_query = np.eye(*shape) + 0.1 * w_query
            w_key = 0.5 * np.eye(*shape) + 0.1 * w_key
        case unknown:
            raise ValueError(f"expected a known kind of case, got {unknown!r}")
    return x, w_query, w_key


def _exact_coupling(strength, shape):
    """Matrices with A = strength · I, free of rounding: sqrt(r) has to be a power of two."""
    return np.eye(*shape) * np.sqrt(shape[1]) * strength, np.eye(*shape)


def _signed_margin(x, w_query, w_key):
    """Signed smallest singular value of D at SINGULAR_POSITION, from its definition."""
    t, root = SINGULAR_POSITION, np.sqrt(w_query.shape[1])
    past, keys = x[:t], x[:t] @ w_key
    logits = keys @ (x[t] @ w_query) / root
    alpha = np.exp(logits - logits.max())
    alpha /= alpha.sum()
    covariance = (past - alpha @ past).T @ (alpha[:, None] * (keys - alpha @ keys))
    block = np.eye(x.shape[1]) - covariance @ w_query.T / root
    margin = np.linalg.svd(block, compute_uv=False)[-1]
    return margin if np.linalg.det(block) > 0 else -margin


def _strength(x, w_query, w_key, target):
    """Multiplier of w_query at which the signed margin is `target`, by bisection."""
    low = high = 0.0
    while _signed_margin(x, high * w_query, w_key) > target:
        low, high = high, high + 0.1
        if high > 100:
            raise ValueError(f"expected a crossing of {target} below strength 100: change the seed")
    for _ in range(80):
        middle = (low + high) / 2
        if _signed_margin(x, middle * w_query, w_key) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
