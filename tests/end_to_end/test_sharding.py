"""Fits and chains on four devices: the same as on one. A child process has the devices."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from probattn.inference.fitting.sharding import Placement, parse_mesh, spread_along
from tests.support.four_devices import in_child

MESHES = ("data=4", "fsdp=4", "data=2,fsdp=2")
CHILD = r"""
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
import numpyro, numpyro.distributions as dist
from probattn import relaxed_barrier
from probattn.text.corpora import DataConfig
from probattn.inference import FitConfig, RunConfig, SampleConfig, sample
from probattn.inference.fitting.sharding import Placement
from probattn.inference.fitting.svi import Trainer
from probattn.models import LanguageModelConfig, ObjectiveConfig

MODEL = LanguageModelConfig(layers=1, heads=2, width=32, block=6, prior_rank=1)
# Large steps and a weight against which the barrier is crossed: the retreat is part of it.
CONFIG = RunConfig(
    DataConfig("none"),
    MODEL,
    ObjectiveConfig("full", residual_weight=0.3),
    FitConfig(steps=100, batch=8, warmup=5, learning_rate=0.01, seed=3),
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 12, 2000), jnp.int32)


def losses_of(trainer, state, start=0, stop=100):
    found = []
    for step in range(start, stop):
        state, progress = trainer.advance(state, step, step + 1)
        found.append(float(progress.loss))
    return state, found


def collectives(trainer):
    text = trainer._advance.as_text()
    found = re.findall(r"= (.*) (all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    return [re.sub(r"\{[^}]*\}", "", shape) for shape, _ in found]


out = {"losses": {}, "gathered": {}, "shards": {}}
halfway = None
for mesh in ("", "data=4", "fsdp=4", "data=2,fsdp=2"):
    trainer = Trainer(CONFIG, TOKENS, 12, placement=Placement(mesh, batch=8))
    state, first = losses_of(trainer, trainer.init(), stop=50)
    if mesh == "data=4":
        saved = trainer.saved(state)
    state, second = losses_of(trainer, state, start=50)
    out["losses"][mesh] = first + second
    out["gathered"][mesh] = collectives(trainer)
    params, moments = state.svi.optim_state[1][0], state.svi.optim_state[1][1][0].nu
    name = "mlp_in_auto_loc"
    out["shards"][mesh] = [
        leaf[name].addressable_shards[0].data.shape for leaf in (params, moments)
    ]
    if mesh == "data=2,fsdp=2":  # a state of another mesh
        state = trainer.restored(trainer.init(), lambda like: saved)
        state, out["resumed"] = losses_of(trainer, state, start=50)
    out["rejected"] = int(state.rejected)

# The determinants alone, with sequences that pass the boundary and a gradient.
rng = np.random.default_rng(1)
x, w = jnp.asarray(rng.normal(size=(8, 5, 3))), jnp.asarray(rng.normal(size=(3, 2)))
value = jax.jit(jax.value_and_grad(lambda x: relaxed_barrier(x, w, w).sum()))
placement = Placement("data=4", batch=8)
plain = value(x)
with placement.context():
    spread = value(x)
    out["barrier_devices"] = "manual" in str(value.lower(x).as_text())
out["barrier"] = [float(abs(a - b).max() / abs(a).max()) for a, b in zip(plain, spread)]

for text, batch in (("data=2", 8), ("fsdp=8", 8), ("data=2,fsdp=2", 6)):
    try:
        Placement(text, batch=batch)
    except ValueError as error:
        out.setdefault("refused", []).append(str(error))


def model(observed):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    numpyro.sample("observed", dist.Normal(0.0, scale), obs=observed)


every, draws = jax.local_devices, {}
for method, chains in (("parallel", 5), ("vectorized", 4)):
    config = SampleConfig(chains=chains, warmup=200, draws=300, seed=3, chain_method=method)
    for count in (4, 1):
        jax.local_devices = lambda: every()[:count]
        found = sample(model, model_args=(np.array([0.3, -1.0, 2.0]),), config=config)
        draws[method, count] = found.draws["scale"]
out["parallel_equal"] = bool((draws["parallel", 4] == draws["parallel", 1]).all())
out["chains"] = len(set(draws["parallel", 4][:, -1].tolist()))
out["vectorized"] = [float(draws["vectorized", n].mean()) for n in (4, 1)]
print(json.dumps(out))
"""


@pytest.fixture(scope="module", name="four")
def four_fixture():
    return in_child(CHILD, JAX_DISABLE_MOST_OPTIMIZATIONS="1")  # which is what costs time


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_losses_on_four_devices_are_those_on_one(four, mesh):
    # Sums over a minibatch are rounded in another order: 1e-7 a step, which Adam hardly enlarges.
    np.testing.assert_allclose(four["losses"][mesh], four["losses"][""], rtol=1e-5)
    assert four["losses"][""][-1] < four["losses"][""][0] - 0.05


@pytest.mark.slow
def test_a_state_of_one_mesh_goes_on_on_another(four):
    np.testing.assert_allclose(four["resumed"], four["losses"][""][50:], rtol=1e-5)


@pytest.mark.slow
def test_parameters_and_moments_are_spread_over_fsdp_alone(four):
    assert four["shards"]["data=4"] == [[1, 32, 128]] * 2
    assert four["shards"]["fsdp=4"] == [[1, 32, 32]] * 2
    assert four["shards"]["data=2,fsdp=2"] == [[1, 32, 64]] * 2


@pytest.mark.slow
def test_nothing_but_parameters_is_gathered(four):
    assert four["gathered"]["data=4"] == []
    parameters = {"f32[1,32,128]", "f32[1,128,32]", "f32[1,32,96]"}
    assert set(four["gathered"]["fsdp=4"]) == parameters - {"f32[1,32,96]"}  # 768 numbers a device
    assert set(four["gathered"]["data=2,fsdp=2"]) == parameters


@pytest.mark.slow
def test_determinants_are_taken_by_each_device_for_its_sequences(four):
    assert four["barrier_devices"]
    assert max(four["barrier"]) < 1e-5  # of the largest, value and gradient


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_the_devices_or_the_batch_is_refused(four):
    few, many, batch = four["refused"]
    assert "mesh data=2 is of 2 devices, and there are 4" in few
    assert "mesh fsdp=8 is of 8 devices, and there are 4" in many
    assert "fit.batch is 6 and mesh data=2,fsdp=2 of 4 devices: expected a multiple of 4" in batch


@pytest.mark.slow
def test_parallel_chains_on_four_devices_draw_what_they_draw_on_one(four):
    assert four["parallel_equal"]
    assert four["chains"] == 5


@pytest.mark.slow
def test_vectorized_chains_on_four_devices_have_the_same_distribution(four):
    many, one = four["vectorized"]
    np.testing.assert_allclose(many, one, rtol=0.1)  # means of 1200 draws, of deviation 0.3


@pytest.mark.parametrize(
    "text", ["data", "data=0", "data=-1", "data=2,", "model=2", "data=2,data=2", "data=1.5", "4"]
)
def test_a_text_that_is_no_mesh_is_refused(text):
    with pytest.raises(ValueError, match="expected data=N, fsdp=N or both"):
        parse_mesh(text)


def test_a_mesh_of_one_device_is_one():
    assert parse_mesh(" fsdp=1 ") == {"data": 1, "fsdp": 1}
    assert Placement("data=1").mesh.size == 1
    with pytest.raises(ValueError, match="mesh data=2 is of 2 devices, and there are 1"):
        Placement("data=2", batch=2)


@pytest.mark.parametrize(
    ("shape", "devices", "expected"),
    [
        ((4, 64, 256), 4, PartitionSpec(None, None, "fsdp")),
        ((4, 256, 64), 4, PartitionSpec(None, "fsdp")),
        ((101, 128), 4, PartitionSpec(None, "fsdp")),  # the longest is not divisible
        ((101, 103), 4, PartitionSpec()),
        ((4, 64), 4, PartitionSpec()),  # gains are small
        ((2**20,), 8, PartitionSpec("fsdp")),
        ((), 2, PartitionSpec()),
        ((256, 256), 1, PartitionSpec()),
    ],
)
def test_where_parameters_are_cut(shape, devices, expected):
    assert spread_along(shape, devices) == expected


COMMAND = """
import json, sys
from probattn.inference.cli import main
sys.argv = ["probattn", *{arguments!r}]
status = main()
import jax
print(json.dumps([status, jax.device_count()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "devices"),
    [(["evaluate", "missing"], 1), (["fit", "--data", "missing", "--out", "missing"], 4)],
    ids=["evaluate", "fit"],
)
def test_a_command_of_one_device_is_not_divided_among_those_that_are_simulated(arguments, devices):
    assert in_child(COMMAND.format(arguments=arguments)) == [2, devices]
