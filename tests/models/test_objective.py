"""Names and weights of the objective, and what it refuses."""

import dataclasses

import pytest

from probattn.models import ObjectiveConfig

NAMES = ["ce", "margin", "full", "latent"]
NO_NUMBERS = [pytest.param(10**400, id="huge"), "1", True, [1.0], 1j]  # no float holds the first
WEIGHTS = {"ce": (0.0, 0.0), "margin": (0.05, 0.0), "full": (1.0, 1.0), "latent": (0.0, 0.0)}


def refusal(**fields):
    """The one line with which a configuration is refused."""
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        ObjectiveConfig(**fields)
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_implies_the_weights(name):
    assert ObjectiveConfig(name).weights == WEIGHTS[name]


def test_the_default_is_the_margin_of_the_paper():
    config = ObjectiveConfig()
    assert config == ObjectiveConfig("margin")
    assert (config.residual_scale, config.delta, config.attention) == (1.0, 1e-3, "separate")
    assert config.one_sided is False


@pytest.mark.parametrize("name", ["margin", "full"])
def test_weights_given_win_each_by_itself(name):
    barrier, residual = WEIGHTS[name]
    assert ObjectiveConfig(name, barrier_weight=0.3).weights == (0.3, residual)
    assert ObjectiveConfig(name, residual_weight=0.4).weights == (barrier, 0.4)
    assert ObjectiveConfig(name, barrier_weight=0.3, residual_weight=0.4).weights == (0.3, 0.4)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_zero_is_a_weight_given(name):
    assert ObjectiveConfig(name, barrier_weight=0.0, residual_weight=0.0).weights == (0.0, 0.0)


@pytest.mark.parametrize("before", NAMES)
@pytest.mark.parametrize("after", NAMES)
def test_replacing_the_name_brings_its_own_weights(before, after):
    assert dataclasses.replace(ObjectiveConfig(before), name=after).weights == WEIGHTS[after]


def test_replacing_the_name_keeps_weights_given():
    config = ObjectiveConfig("margin", barrier_weight=0.3)
    assert dataclasses.replace(config, name="full").weights == (0.3, 1.0)
    with pytest.raises(ValueError, match=r"barrier_weight is 0\.3 with objective ce"):
        dataclasses.replace(config, name="ce")


@pytest.mark.parametrize(
    ("name", "attention", "trains"),
    [
        ("ce", "separate", False),
        ("margin", "separate", True),
        ("margin", "first_layer", False),
        ("full", "separate", True),
        ("full", "first_layer", False),
        ("margin", "normalised", True),
        ("full", "normalised", True),
        ("latent", "separate", True),
    ],
)
def test_only_a_stage_of_its_own_has_matrices_to_train(name, attention, trains):
    assert ObjectiveConfig(name, attention=attention).trains_attention_prior is trains


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ObjectiveConfig().name = "full"


@pytest.mark.parametrize("name", ["CE", "", "barrier", None])
def test_an_unknown_name_is_refused(name):
    expected = f"objective.name is {name!r}: expected one of ce, margin, full, latent"
    assert refusal(name=name) == expected


def test_an_unknown_attention_stage_is_refused():
    expected = "objective.attention is 'last_layer': expected one of "
    assert refusal(attention="last_layer") == expected + "separate, first_layer, normalised"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", ["barrier_weight", "residual_weight"])
@pytest.mark.parametrize("weight", [-0.05, float("nan"), float("inf"), -float("inf"), *NO_NUMBERS])
def test_a_weight_that_is_negative_or_not_finite_is_refused(name, field, weight):
    expected = f"objective.{field} is {weight!r}: expected a finite number >= 0"
    assert refusal(name=name, **{field: weight}) == expected


@pytest.mark.parametrize("name", ["ce", "latent"])
@pytest.mark.parametrize("field", ["barrier_weight", "residual_weight"])
def test_a_weight_of_what_an_objective_has_not_is_refused(name, field):
    message = refusal(name=name, **{field: 0.05})
    assert message.startswith(f"objective.{field} is 0.05 with objective {name}")
    assert "expected 0, or another objective.name" in message


@pytest.mark.parametrize(
    ("field", "value", "default", "names", "by"),
    [
        ("residual_scale", 2.0, 1.0, ["ce", "latent"], "margin or full"),
        ("delta", 0.01, 0.001, ["ce", "latent"], "margin or full"),
        ("attention", "first_layer", "separate", ["ce", "latent"], "margin or full"),
        ("attention", "normalised", "separate", ["ce", "latent"], "margin or full"),
        ("one_sided", True, False, ["ce", "latent"], "margin or full"),
        ("beta", 0.1, 1.0, ["ce", "margin", "full"], "latent"),
        ("guide_scale", 0.25, 0.5, ["ce", "margin", "full"], "latent"),
        ("learn_guide_scale", True, False, ["ce", "margin", "full"], "latent"),
    ],
)
def test_a_setting_of_another_objective_is_refused(field, value, default, names, by):
    for name in names:
        assert refusal(name=name, **{field: value}) == (
            f"objective.{field} is {value!r} with objective {name}, which has no use for it: "
            f"expected the default, {default!r}, or objective.name {by}"
        )
    for name in set(NAMES) - set(names):
        assert getattr(ObjectiveConfig(name, **{field: value}), field) == value


@pytest.mark.parametrize("field", ["residual_scale", "delta", "beta", "guide_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), None, *NO_NUMBERS])
def test_a_scale_that_is_not_positive_is_refused(field, value):
    expected = f"objective.{field} is {value!r}: expected a finite number > 0"
    assert refusal(**{field: value}) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", ["one_sided", "learn_guide_scale"])
@pytest.mark.parametrize("value", ["no", "", 0, 1, None])
def test_a_switch_that_is_neither_on_nor_off_is_refused(name, field, value):
    expected = f"objective.{field} is {value!r}: expected True or False"
    assert refusal(name=name, **{field: value}) == expected
