"""Rounded weights against a loop over groups."""

import jax.numpy as jnp
import numpy as np
import pytest

from probattn.models.decoder.rounding import round_weights


def by_hand(column, bits, group):
    rounded = np.array(column, np.float64)
    for start in range(0, len(rounded), group):
        part = rounded[start : start + group]
        step = abs(part).max() / (2 ** (bits - 1) - 1)
        if step:
            rounded[start : start + group] = step * np.round(part / step)
    return rounded


def tree(seed=0):
    rng = np.random.default_rng(seed)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape))

    layer = {
        "query": {"weights": drawn(5, 2, 3), "bias": drawn(2, 3)},
        "out": {"weights": drawn(2, 3, 5)},
        "mlp_norm": {"gain": drawn(5)},
    }
    return {"embedding": {"tokens": drawn(7, 5)}, "layers": {"0": layer, "1": layer}}


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_each_group_of_each_output_is_rounded_by_its_own_step(bits):
    before, group = tree(), 4
    after = round_weights(before, bits, group=group)
    layer, rounded = before["layers"]["1"], after["layers"]["1"]
    for head in range(2):
        for output in range(3):
            column = layer["query"]["weights"][:, head, output]
            expected = by_hand(column, bits, group)
            found = rounded["query"]["weights"][:, head, output]
            np.testing.assert_allclose(found, expected, atol=1e-14)
    for output in range(5):  # whose inputs are heads and their widths
        expected = by_hand(layer["out"]["weights"][..., output].ravel(), bits, group)
        found = rounded["out"]["weights"][..., output]
        np.testing.assert_allclose(found.ravel(), expected, atol=1e-14)
    for row, found in zip(before["embedding"]["tokens"], after["embedding"]["tokens"], strict=True):
        np.testing.assert_allclose(found, by_hand(row, bits, group), atol=1e-14)
    for name, leaf in (("query", "bias"), ("mlp_norm", "gain")):
        np.testing.assert_array_equal(rounded[name][leaf], layer[name][leaf])


def test_only_what_is_named_is_rounded():
    before = tree()
    after = round_weights(before, 2, only=("embedding", "layers.0."))
    assert after["layers"]["1"] is before["layers"]["1"]
    assert (
        after["layers"]["0"]["query"]["weights"] != before["layers"]["0"]["query"]["weights"]
    ).any()
    assert (after["embedding"]["tokens"] != before["embedding"]["tokens"]).any()


def test_zeros_stay_zeros_in_their_dtype():
    zeros = {"embedding": {"tokens": jnp.zeros((2, 3), jnp.float16)}}
    found = round_weights(zeros, 4)["embedding"]["tokens"]
    assert found.dtype == jnp.float16
    assert not found.any()


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 4, "group": 0}])
def test_what_no_weight_has_is_refused(options):
    with pytest.raises(ValueError, match="expected bits >= 2"):
        round_weights(tree(), **options)
