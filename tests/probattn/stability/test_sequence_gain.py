"""The gain of a sequence against the singular values of its dense Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from tests.support.cases import SINGULAR_CASES, Case, make
from tests.support.dense import diagonal_blocks, quick_jit, whole_jacobian

pytestmark = pytest.mark.usefixtures("strict_promotion", "strict_ranks")

SHAPE = T, D, R = 16, 4, 4  # T d is more than the 32 directions of the basis
CASES = [
    Case("random", *SHAPE, seed=1),
    Case("sharp", *SHAPE, seed=2, scale=3.0),
    Case("attractive", *SHAPE, seed=3, kind="attractive", scale=0.7),
    Case("repulsive", *SHAPE, seed=4, kind="repulsive"),
    Case("folded", *SHAPE, seed=5, kind="near_singular", target=-0.1),
    Case("near_singular", *SHAPE, seed=6, kind="near_singular", target=1e-6),
    Case("four_equal_singular_values", *SHAPE, seed=7, kind="all_equal"),
    Case("four_close_singular_values", *SHAPE, seed=8, scale=1e-2),
]

sequence_gain = quick_jit(pa.sequence_gain)


def dense(x, w_query, w_key, bound=None):
    """u, singular values and v of the Jacobian, J u = v sigma, the smallest first."""
    v, sizes, u = np.linalg.svd(whole_jacobian(x, w_query, w_key, bound))
    return np.swapaxes(u, -1, -2)[..., ::-1], sizes[..., ::-1], v[..., ::-1]


def share(vectors, length):
    """Of each token in the square of the first vector."""
    return np.square(vectors[..., 0].reshape(*vectors.shape[:-2], length, -1)).sum(-1)


def check(found, inputs, bound=None):
    """Compare a batch with dense singular values of the very numbers that were given."""
    exact = [np.asarray(part, np.float64) for part in inputs]
    u, sizes, v = dense(*exact, bound)
    eps = np.finfo(found.gain.dtype).eps
    # What rounding of the Jacobian leaves open, and what the tolerance of the iteration does.
    allowed = 1e-9 + 30 * eps * (1 + sizes[..., -1] / sizes[..., 0])
    np.testing.assert_array_less(np.abs(found.gain * sizes[..., 0] - 1), allowed)
    assert np.all(found.error <= np.sqrt(eps) / 2)
    simple = sizes[..., 1] > 1.02 * sizes[..., 0]
    for got, vectors in ((found.embedding_share, u), (found.residual_share, v)):
        np.testing.assert_allclose(got.sum(-1), 1, rtol=100 * eps)
        away = np.abs(got - share(vectors, exact[0].shape[-2])).max(-1)
        assert np.all(away[simple] <= 100 * (found.error + allowed)[simple])
    return simple


@pytest.fixture(scope="module", name="found")
def found_fixture():
    """What one program finds of sequences of one shape, by name, and the sequences."""
    inputs = {case.name: make(case) for case in CASES}
    x, w_query, w_key = inputs["random"]
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((D, D)))[0]
    inputs["rotated"] = x @ rotation, rotation.T @ w_query, rotation.T @ w_key
    inputs["uniform"] = x, 0 * w_query, w_key
    singular = Case("singular", *SHAPE, seed=9, kind="singular")
    inputs["singular"] = make(singular)
    spoilt = x.copy()
    spoilt[5, 1] = np.nan
    inputs["nan"] = spoilt, w_query, w_key
    values = sequence_gain(*(np.stack(part) for part in zip(*inputs.values(), strict=True)))
    values = jax.tree.map(np.asarray, values)
    return {
        name: (jax.tree.map(lambda part, n=number: part[n], values), inputs[name])
        for number, name in enumerate(inputs)
    }


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_gain_and_shares_match_dense_singular_vectors(found, name):
    values, inputs = found[name]
    simple = check(values, inputs)
    assert simple == (not name.startswith("four"))


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_gain_is_at_least_what_the_margins_say(found, name):
    values, inputs = found[name]
    blocks = diagonal_blocks(whole_jacobian(*inputs), T)
    margin = np.linalg.svd(blocks, compute_uv=False)[:, -1].min()
    assert values.gain * margin >= 1 - 1e-6  # a margin of 1e-6 has ten digits


def test_uniform_attention_has_the_closed_form(found):
    """J^-1 is 1 on the diagonal and 1/(s + 1) below it, in every dimension; margins are 1."""
    values, _ = found["uniform"]
    inverse = np.tri(T, k=-1) / np.arange(1, T + 1) + np.eye(T)
    u, sizes, v = np.linalg.svd(inverse)
    np.testing.assert_allclose(values.gain, sizes[0], rtol=1e-12)
    assert round(float(values.gain), 2) == 5.06
    # All d directions share their shares.
    np.testing.assert_allclose(values.embedding_share, u[:, 0] ** 2, atol=1e-7)
    np.testing.assert_allclose(values.residual_share, v[0] ** 2, atol=1e-7)


def test_a_rotation_of_the_embeddings_changes_nothing(found):
    for part, rotated in zip(found["random"][0], found["rotated"][0], strict=True):
        np.testing.assert_allclose(part, rotated, atol=1e-7)


def test_a_singular_block_has_infinite_gain_and_a_nan_has_none(found):
    values, _ = found["singular"]
    assert values.gain == np.inf
    assert values.error == 0
    assert np.isnan(values.embedding_share).all()
    assert np.isnan(values.residual_share).all()
    assert all(np.isnan(part).all() for part in found["nan"][0])


def test_gain_of_a_bounded_context_and_its_derivative():
    """Of a basis of the whole space, too; the derivative is that of differences."""
    inputs = make(Case("small", 6, 3, 2, seed=11))
    rng = np.random.default_rng(1)
    tangents = *(rng.standard_normal(part.shape) for part in inputs), 0.3

    def of(x, w_query, w_key, bound):
        found = pa.sequence_gain(x, w_query, w_key, bound=bound)
        return found.gain, found

    def differentiated(inputs, tangents):
        return jax.jvp(of, inputs, tangents, has_aux=True)

    arguments = *inputs, 1.5
    _, slope, found = quick_jit(differentiated)(arguments, tangents)
    assert check(jax.tree.map(np.asarray, found), inputs, 1.5)
    step = 1e-5
    forward, backward = (
        1
        / dense(*(part + h * tangent for part, tangent in zip(arguments, tangents, strict=True)))[
            1
        ][0]
        for h in (step, -step)
    )
    np.testing.assert_allclose(slope, (forward - backward) / (2 * step), rtol=1e-6)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"x has shape \(3,\): expected \(\.\.\., T, d\)"):
        pa.sequence_gain(np.ones(3), np.ones((3, 2)), np.ones((3, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param((1, 4, 2), np.float64, marks=pytest.mark.nightly),
        ((9, 2, 4), np.float64),
        pytest.param((7, 5, 1), np.float32, marks=pytest.mark.nightly),
        ((40, 6, 8), np.float32),
        pytest.param((40, 6, 8), np.float64, marks=pytest.mark.nightly),
    ],
)
def test_other_shapes_and_precisions_match_dense_singular_vectors(shape, dtype):
    cases = [
        Case(f"{kind} {scale}", *shape, seed=20 + number, kind=kind, scale=scale)
        for number, (kind, scale) in enumerate(
            [("random", 1.0), ("random", 3.0), ("attractive", 0.5), ("repulsive", 1.0)]
        )
    ]
    inputs = [np.stack(part) for part in zip(*(make(case, dtype) for case in cases), strict=True)]
    found = jax.tree.map(np.asarray, sequence_gain(*inputs))
    assert found.gain.dtype == found.embedding_share.dtype == dtype
    check(found, inputs)
    if shape[0] == 1:
        np.testing.assert_allclose(found.gain, 1, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scale",
    [0.5, *(pytest.param(s, marks=pytest.mark.nightly) for s in (0.0, 1e-3, 0.1, 1.0, 2.0))],
)
def test_gain_of_64_tokens_in_16_dimensions_is_that_of_the_dense_matrix(scale):
    """The number that was asked for: 1e-8, relative, also where 16 singular values crowd."""
    case = Case("64 x 16", 64, 16, 4, seed=30)
    x, w_query, w_key = make(case)
    found = pa.sequence_gain(x, scale * w_query, scale * w_key)
    true = 1 / dense(x, scale * w_query, scale * w_key)[1][0]
    np.testing.assert_allclose(found.gain, true, rtol=1e-8)


@pytest.mark.slow
def test_heads_have_axes_of_their_own_and_vmap_is_a_batch():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 1, 10, 4))
    w_query, w_key = rng.standard_normal((2, 2, 4, 2)) / 2
    found = pa.sequence_gain(x, w_query, w_key)
    assert found.gain.shape == found.error.shape == (3, 2)
    assert found.embedding_share.shape == found.residual_share.shape == (3, 2, 10)
    mapped = jax.vmap(lambda x: pa.sequence_gain(x, w_query, w_key))(jnp.asarray(x))
    for part, other in zip(found, mapped, strict=True):
        np.testing.assert_allclose(part, other, atol=1e-7)
    gradient = jax.grad(lambda *inputs: jnp.sum(pa.sequence_gain(*inputs).gain), (0, 1, 2))
    assert [part.shape for part in gradient(x, w_query, w_key)] == [x.shape, (2, 4, 2), (2, 4, 2)]
    for head in range(2):
        heads = jax.tree.map(lambda part, n=head: np.asarray(part)[:, n], found)
        check(heads, (x[:, 0], *(np.stack([w[head]] * 3) for w in (w_query, w_key))))


@pytest.mark.slow
@pytest.mark.parametrize("case", SINGULAR_CASES, ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_exactly_singular_cases_have_infinite_gain(case, dtype):
    assert sequence_gain(*make(case, dtype)).gain == np.inf
