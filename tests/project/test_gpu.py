"""The command for a GPU, in small on this machine, and the count of what a step must do there."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from probattn.models import tied_tokens
from tests.support.project import BENCHMARKS, ROOT, benchmark


@pytest.fixture(scope="module", name="gpu_model")
def gpu_model_fixture():
    with benchmark("gpu_model") as module:
        yield module


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_products_loops_and_what_nothing_depends_on(gpu_model):
    def program(x, w):
        unused = x @ w @ w
        del unused

        def body(x, _):
            return jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(body, x, length=5)
        x = jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)
        return jax.lax.optimization_barrier(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16))

    found = gpu_model.count(jax.make_jaxpr(program)(shape(3, 4), shape(4, 4)).jaxpr)
    one = 2 * 3 * 4 * 4
    assert found.products == {"float32": 6 * one, "bfloat16": one}
    traffic = 6 * 4 * (12 + 16 + 12) + 2 * (12 + 16 + 12) + 2 * 2 * 12
    assert found.bytes == traffic
    assert found.others >= 5 * 12
    assert found.largest == (48, "float32[3,4]")


@pytest.mark.slow
def test_products_of_a_step_are_those_that_xla_counts(gpu_model):
    """Without loops, of whose rounds XLA counts one."""

    def loss(w, x):
        for _ in range(3):
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    arguments = shape(64, 64), shape(32, 64)
    found = gpu_model.count(jax.make_jaxpr(jax.value_and_grad(loss))(*arguments).jaxpr)
    with jax.enable_x64(False):
        true = jax.jit(jax.value_and_grad(loss)).lower(*arguments).cost_analysis()["flops"]
    assert found.products["float32"] == pytest.approx(true, rel=0.05)


@pytest.mark.slow
def test_the_step_of_a_fit_in_small(gpu_model, monkeypatch):
    monkeypatch.setattr(tied_tokens, "LARGEST", 2**12)  # as a vocabulary of 50,257 is in slices
    with jax.enable_x64(False):
        rows = gpu_model.gpu_model(tiny=True)["rows"]
    ce, *barriers, anew = rows
    assert [row["rank"] for row in barriers] == [*gpu_model.RANKS]
    # The network multiplies no wider numbers than it should, and the barrier no shorter ones.
    assert list(ce["operations_of_products"]) == ["bfloat16"]
    for row in barriers:
        found = row["operations_of_products"]
        assert found["bfloat16"] == ce["operations_of_products"]["bfloat16"]
        assert found["float32"] > 0
    assert ce["ratio"] == 1 < barriers[0]["ratio"] < barriers[1]["ratio"]
    assert anew["rematerialise"]
    assert anew["operations_of_products"]["bfloat16"] > ce["operations_of_products"]["bfloat16"]


@pytest.mark.nightly
def test_the_command_in_small(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--tiny", "--out", out]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert list(rows) == ["mathematics", "one_step", "training_steps", "fit_and_resume", "nuts"]
    for name in ("mathematics", "one_step", "fit_and_resume"):
        assert rows[name]["agrees"], rows[name]
    steps = rows["training_steps"]["rows"]
    assert list(steps) == ["ce", "margin, r = 4", "margin, r = 8", "control"]
    for row in steps.values():
        assert row["callbacks"] == 0
        assert row["tokens_per_second"] > 0
    assert rows["nuts"]["ratio"] > 0

    subprocess.run([*command, "--limit", "0"], check=True, capture_output=True, cwd=ROOT)
    assert all("left_out" in row for row in json.loads(out.read_text("utf-8"))["rows"].values())
