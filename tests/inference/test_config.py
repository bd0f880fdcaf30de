"""Configurations: what they refuse, and their way to TOML and back."""

import dataclasses
import math
import os
import re

import pytest

from probattn.inference import FitConfig, RunConfig, SampleConfig, read_config
from probattn.inference.config_files import differences, format_config
from probattn.inference.config_sampling import SampleRunConfig
from probattn.models import LanguageModelConfig, LatentEmbeddingsConfig, ObjectiveConfig
from probattn.text.corpora import DataConfig

OTHER = RunConfig(
    DataConfig('a "quoted"\\path\n\u2028é🦞.txt', "second.txt", 0.25, "bpe:300"),
    LanguageModelConfig(
        layers=2, heads=3, width=12, block=5, prior_rank=1, bound=0.5, spectral_cap=0.9
    ),
    ObjectiveConfig("full", 0.5, 1e-30, 2.0, 1e-9, "first_layer"),
    FitConfig(
        *(7, 3, 1e-300, 6, 2**32 - 1, 5, 2, "bfloat16", "low_rank"),
        rematerialise=True,
        gradient_accumulation=3,
    ),
)
# What does not go with the guide above, or with its objective, or with each other.
MAP = RunConfig(
    objective=ObjectiveConfig("margin", attention="normalised", one_sided=True),
    fit=FitConfig(weight_decay=0.1, embedding_noise=0.5, sam_rho=1e-300, evaluation_tokens=1000),
)
LATENT = RunConfig(
    objective=ObjectiveConfig("latent", 0.0, 0.0, 1.0, 1e-3, "separate", False, 0.1, 2.0, True)
)
NEFTUNE = RunConfig(fit=FitConfig(neftune_alpha=5.0, noise_probability=0.25))
IVON = RunConfig(fit=FitConfig(guide="ivon", hessian_init=1e-300, hessian_decay=0.5))


def written(folder, text):
    path = folder / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path):
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as raises:
        read_config(path)
    message = str(raises.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


# TOML


def test_the_other_configuration_differs_in_every_field():
    fields = sum(len(dataclasses.fields(part)) for part in vars(OTHER).values())
    others = (OTHER, MAP, LATENT, NEFTUNE, IVON)
    changed = {
        line.partition(":")[0] for other in others for line in differences(RunConfig(), other)
    }
    assert len(changed) == fields


@pytest.mark.parametrize(
    "config",
    [RunConfig(), OTHER, MAP, LATENT, NEFTUNE, IVON],
    ids=["default", "other", "map", "latent", "neftune", "ivon"],
)
def test_toml_and_back(tmp_path, config):
    assert read_config(written(tmp_path, format_config(config))) == config


def test_a_file_that_an_editor_of_windows_has_saved(tmp_path):
    """With a byte-order mark, and with CRLF at the ends of lines."""
    path = tmp_path / "config.toml"
    text = format_config(OTHER).replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_config(path) == OTHER


def test_toml_leaves_out_what_is_none(tmp_path):
    text = format_config(RunConfig())
    assert "None" not in text
    assert not any(name in text for name in ("validation =", "barrier_weight", "residual_weight"))


def test_what_a_file_leaves_out_is_default(tmp_path):
    assert read_config(written(tmp_path, "")) == RunConfig()
    config = read_config(written(tmp_path, "[fit]\nsteps = 500\n[objective]\n"))
    assert config == RunConfig(fit=FitConfig(steps=500))


def test_an_integer_is_a_float_where_one_is_expected(tmp_path):
    config = read_config(written(tmp_path, "[fit]\nlearning_rate = 1\n[objective]\ndelta = 2"))
    assert type(config.fit.learning_rate) is float
    assert (config.fit.learning_rate, config.objective.delta) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[fitt]\n", "unknown tables: fitt; expected data, model, objective, fit"),
        ("steps = 3\n", "unknown tables: steps; expected data, model, objective, fit"),
        ("fit = 3\n", "fit is 3: expected a table, [fit]"),
        ("[[fit]]\nsteps = 3\n", "fit is [{'steps': 3}]: expected a table, [fit]"),
        ("[fit]\nstep = 3\nrate = 1\n", "unknown fields of [fit]: rate, step; expected steps, "),
        ("[model]\nwidth = true\n", "model.width is True: expected int"),
        ("[fit]\nsteps = 3.0\n", "fit.steps is 3.0: expected int"),
        ("[fit]\nsteps = '3'\n", "fit.steps is '3': expected int"),
        ("[fit]\nseed = [1]\n", "fit.seed is [1]: expected int"),
        ("[fit]\nlearning_rate = true\n", "fit.learning_rate is True: expected float"),
        ("[fit]\nlearning_rate = 'fast'\n", "fit.learning_rate is 'fast': expected float"),
        ("[fit]\nprecision = 32\n", "fit.precision is 32: expected str"),
        ("[objective]\nbarrier_weight = '1'\n", "objective.barrier_weight is '1': expected float"),
        ("[data]\nvalidation = 1\n", "data.validation is 1: expected str"),
        ("[data]\nsource = {a = 1}\n", "data.source is {'a': 1}: expected str"),
        # What the dataclasses themselves refuse, with the file's name before it:
        ("[fit]\nsteps = 0\n", "fit.steps is 0: expected an integer >= 1"),
        ("[fit]\nlearning_rate = nan\n", "fit.learning_rate is nan: expected a finite number > 0"),
        ("[model]\nwidth = 10\n", "model.heads is 4 and model.width 10: expected heads to divide"),
        ("[model]\nprior_rank = 0\n", "model.prior_rank is 0: expected an integer >= 1"),
        ("[objective]\nname = 'mse'\n", "objective.name is 'mse': expected one of ce, margin, ful"),
        ("[objective]\nbarrier_weight = -1\n", "objective.barrier_weight is -1.0: expected a fin"),
        ("[data]\ntokenizer = 'word'\n", "data.tokenizer: got 'word', expected"),
    ],
)
def test_a_file_that_says_what_no_run_can_be(tmp_path, text, message):
    assert refusal(written(tmp_path, text)).startswith(message)


@pytest.mark.parametrize(
    "text",
    [b"[fit", b"steps", b"[fit]\nsteps = 3\nsteps = 4", b"[data]\nsource = 'caf\xe9'", b"\0"],
)
def test_a_file_that_is_no_toml(tmp_path, text):
    assert refusal(written(tmp_path, text)).startswith("expected a TOML file: ")


def test_a_device_a_pipe_and_a_huge_file_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", os.devnull):
        assert refusal(path) == "expected a TOML file: got a device or a pipe"
    (tmp_path / "huge.toml").touch()
    os.truncate(tmp_path / "huge.toml", 2**40)
    message = refusal(tmp_path / "huge.toml")
    assert message == "expected a TOML file: it has more than 16384 bytes"


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        ("fit.steps", FitConfig),
        ("fit.evaluation_tokens", FitConfig),
        ("model.width", LanguageModelConfig),
        ("latent.sequences", LatentEmbeddingsConfig),
        ("sample.draws", SampleConfig),
    ],
)
def test_an_integer_that_no_array_holds(field, kind):
    with pytest.raises(ValueError, match=f"{field} is an integer of 84 bits: expected at most 63"):
        kind(**{field.partition(".")[2]: 10**25})


def test_a_file_that_cannot_be_read(tmp_path):
    assert "No such file" in refusal(tmp_path / "missing.toml")
    assert "directory" in refusal(tmp_path)


# Fields of [fit]

NO_INTEGER = (True, 1.5, "3", None)
HUGE = 10**400  # no float holds it
REGULARISERS = ("weight_decay", "embedding_noise", "neftune_alpha", "sam_rho")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, value) for name in ("steps", "batch") for value in (0, -1, *NO_INTEGER)),
        *((name, 0) for name in ("eval_every", "checkpoint_every")),
        *(("evaluation_tokens", value) for value in (0, -1, True, 1.5, "3")),
        *(("warmup", value) for value in (-1, 2000, 2001, True, 1.5, "3")),
        *(("learning_rate", value) for value in (0, -1e-3, math.nan, math.inf, HUGE)),
        *(("learning_rate", value) for value in ("fast", True, None)),
        *(("seed", value) for value in (-1, 2**32, *NO_INTEGER)),
        *(("precision", value) for value in ("float16", "", 32)),
        *(
            (name, value)
            for name in REGULARISERS
            for value in (-0.1, math.nan, math.inf, HUGE, True, "1", None)
        ),
        *(("noise_probability", value) for value in (0, -0.1, 1.1, math.nan, HUGE, True, "1", 0.5)),
        *(("rematerialise", value) for value in ("no", 0, 1, None)),
    ],
    ids=lambda value: "huge" if value is HUGE else None,
)
def test_fit_config_names_the_field_and_what_it_got(field, value):
    with pytest.raises(ValueError, match=rf"^fit.{field} is .*: expected ") as raises:
        FitConfig(**{field: value})
    assert str(value) in str(raises.value)


def test_fit_config_takes_its_limits():
    least = {"steps": 1, "warmup": 0, "batch": 1, "eval_every": 1, "checkpoint_every": 1, "seed": 0}
    others = {"steps": 2, "warmup": 1, "learning_rate": 1e-300, "seed": 2**32 - 1}
    others |= {"embedding_noise": 1e-300, "noise_probability": 1e-300, "evaluation_tokens": 1}
    for fields in (least, others):
        assert dataclasses.asdict(FitConfig(**fields)).items() >= fields.items()


@pytest.mark.parametrize("name", REGULARISERS)
@pytest.mark.parametrize("guide", ["laplace", "mean_field", "low_rank", "ivon", "last_layer"])
def test_what_changes_the_objective_is_for_a_point(name, guide):
    expected = rf"^fit\.{name} is 0\.1 with the guide {guide}, .*: expected 0, or fit\.guide map$"
    with pytest.raises(ValueError, match=expected):
        FitConfig(guide=guide, **{name: 0.1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hessian_init": 0.0}, r"^fit\.hessian_init is 0\.0: expected a finite number > 0$"),
        ({"hessian_init": math.inf}, r"^fit\.hessian_init is inf: expected a finite number > 0$"),
        ({"hessian_init": HUGE}, r"^fit\.hessian_init is 10+: expected a finite number > 0$"),
        ({"hessian_init": None}, r"^fit\.hessian_init is None: expected a finite number > 0$"),
        ({"hessian_decay": 1}, r"^fit\.hessian_decay is 1: expected a number between 0 and 1$"),
        ({"hessian_decay": 0.0}, r"^fit\.hessian_decay is 0\.0: expected a number between"),
        ({"hessian_decay": True}, r"^fit\.hessian_decay is True: expected a number between"),
        (
            {"hessian_decay": 0.5, "guide": "mean_field"},
            r"^fit\.hessian_decay is 0\.5 with the guide mean_field, which has no use for it: "
            r"expected the default, None, or fit\.guide ivon$",
        ),
        ({"hessian_init": 0.5, "guide": "map"}, r"^fit\.hessian_init is 0\.5 with the guide map, "),
    ],
)
def test_settings_of_ivon(fields, message):
    with pytest.raises(ValueError, match=message):
        FitConfig(**({"guide": "ivon"} | fields))


def test_the_decay_of_ivon_suits_the_steps():
    for steps, decay in ((10, 0.9), (1000, 0.99)):
        config = RunConfig(fit=FitConfig(steps=steps, guide="ivon"))
        assert config.resolved().fit.hessian_decay == pytest.approx(decay)
        assert config.resolved().resolved() == config.resolved()
    assert RunConfig().resolved().fit.hessian_decay is None


def test_one_kind_of_noise_at_a_time():
    with pytest.raises(ValueError, match=r"^fit\.embedding_noise is 0\.5 and fit\.neftune_alpha 5"):
        FitConfig(embedding_noise=0.5, neftune_alpha=5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"guide": "mean_field"},
            r"^fit\.guide is mean_field with objective latent.*expected map$",
        ),
        (
            {"embedding_noise": 0.5},
            r"^fit\.embedding_noise is 0\.5 with objective latent.*expected 0",
        ),
        ({"neftune_alpha": 5.0}, r"^fit\.neftune_alpha is 5\.0 with objective latent.*expected 0"),
    ],
)
def test_a_latent_fit_has_a_guide_and_a_noise_of_its_own(fields, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(objective=ObjectiveConfig("latent"), fit=FitConfig(**fields))
    RunConfig(objective=ObjectiveConfig("latent"), fit=FitConfig(weight_decay=0.1, sam_rho=0.05))


def test_a_stage_of_normalised_tokens_has_no_bound():
    model = LanguageModelConfig(bound=0.5)
    with pytest.raises(
        ValueError, match=r"^model\.bound is 0\.5 with objective\.attention normalis"
    ):
        RunConfig(model=model, objective=ObjectiveConfig("margin", attention="normalised"))
    RunConfig(model=model, objective=ObjectiveConfig("margin", attention="first_layer"))


def test_the_posterior_of_a_latent_language_model_is_not_sampled():
    with pytest.raises(ValueError, match=r"^objective\.name is latent, .*: expected ce, margin or"):
        SampleRunConfig(model=LanguageModelConfig(), objective=ObjectiveConfig("latent"))


@pytest.mark.parametrize("part", [RunConfig(), *vars(RunConfig()).values()])
def test_a_configuration_cannot_be_changed(part):
    name = dataclasses.fields(part)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(part, name, getattr(part, name))


@pytest.mark.parametrize("value", ["no", 0, None])
def test_latent_embeddings_are_centred_or_not(value):
    expected = rf"^latent\.centred is {value!r}: expected True or False$"
    with pytest.raises(ValueError, match=expected):
        LatentEmbeddingsConfig(centred=value)


# Differences


def test_differences_name_each_field_with_both_values():
    old, new = RunConfig(), RunConfig(data=DataConfig(validation="b.txt"), fit=FitConfig(seed=4))
    assert differences(old, new) == ["data.validation: None -> b.txt", "fit.seed: 0 -> 4"]
    assert differences(new, dataclasses.replace(new)) == []


def test_several_texts_are_a_list_in_the_file(tmp_path):
    config = RunConfig(data=DataConfig(source=("b.txt", "a.txt")))
    path = tmp_path / "config.toml"
    path.write_text(format_config(config))
    assert read_config(path) == config
    path.write_text('[data]\nsource = ["a.txt", 3]\n')
    with pytest.raises(ValueError, match=r"data.source: got \('a.txt', 3\), expected"):
        read_config(path)


# Defaults


@pytest.mark.parametrize(
    ("steps", "warmup"),
    [(1, 0), (9, 0), (50, 5), (999, 99), (1000, 100), (2000, 100), (10**6, 100)],
)
def test_the_default_warm_up_suits_the_steps(steps, warmup):
    config = RunConfig(fit=FitConfig(steps=steps))
    assert config.fit.warmup_steps == config.resolved().fit.warmup == warmup
    assert dataclasses.replace(FitConfig(), steps=steps) == config.fit


LEAST = {"steps": 1, "batch": 1, "eval_every": 1, "checkpoint_every": 1, "chains": 1, "draws": 1}
LEAST |= {
    "layers": 1,
    "block": 3,
    "prior_rank": 1,
    "sequences": 1,
    "length": 3,
    "max_tree_depth": 1,
}


@pytest.mark.parametrize(
    "kind", [FitConfig, SampleConfig, LanguageModelConfig, LatentEmbeddingsConfig]
)
def test_no_default_forbids_the_least_or_a_large_value_of_another_field(kind):
    """But for heads: their number is not guessed from a width that they do not divide."""
    for name in LEAST.keys() & {field.name for field in dataclasses.fields(kind)}:
        # Of a posterior, steps and minibatches are those of other methods than the default.
        other = {"method": "sgld"} if kind is SampleConfig and name in ("steps", "batch") else {}
        for value in (LEAST[name], LEAST[name] + 1, 10**6):
            assert getattr(kind(**other, **{name: value}), name) == value
