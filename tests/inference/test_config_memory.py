"""What is larger than the memory is refused before anything is made."""

import os

import pytest

from probattn.inference import config_memory
from probattn.inference.config import FitConfig, RunConfig
from probattn.inference.config_memory import check_size, check_stage, check_tuned_size
from probattn.inference.config_sampling import SampleConfig, SampleRunConfig
from probattn.inference.config_tuning import TuneConfig, TuneFitConfig
from probattn.inference.runtime import memory
from probattn.inference.sampling.posterior_runs import sample_run
from probattn.models import LanguageModelConfig, LatentEmbeddingsConfig, ObjectiveConfig
from probattn.models.decoder.config import DecoderConfig
from probattn.models.networks import DecoderNetwork

GIB = 2**30


@pytest.fixture(autouse=True)
def sixteen_gibibytes(monkeypatch):
    monkeypatch.setattr(config_memory, "host_memory", lambda: 16 * GIB)


def fitted(objective="margin", fit=None, **model):
    config = LanguageModelConfig(**model)
    return RunConfig(model=config, objective=ObjectiveConfig(objective), fit=fit or FitConfig())


def sampled(sample=None, **model):
    return SampleRunConfig(
        sample=sample or SampleConfig(draws=10),
        model=LanguageModelConfig(**model),
        objective=ObjectiveConfig("full"),
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (fitted(layers=10**9), "parameters and optimizer state of"),
        (fitted(prior_rank=10**8), "parameters and optimizer state of"),
        (fitted(width=4 * 10**9), "parameters and optimizer state of"),
        (fitted("ce", FitConfig(guide="low_rank"), width=4096), "parameters and optimizer state"),
        (fitted(prior_rank=30_000), "a step of"),
        (fitted("ce", block=100_000), "a step of"),
        (fitted("ce", FitConfig(batch=10**6)), "a step of"),
        (sampled(layers=10**9), "chains of"),
        (sampled(prior_rank=10**8), "chains of"),
        (sampled(SampleConfig(draws=10**12)), "chains of"),
        (sampled(SampleConfig(chains=10**6)), "chains of"),
        (sampled(SampleConfig(draws=10), layers=1, width=16, block=60_000), "a gradient of every"),
        (SampleRunConfig(latent=LatentEmbeddingsConfig(width=10**8)), "chains of"),
        (SampleRunConfig(latent=LatentEmbeddingsConfig(sequences=10**9)), "chains of"),
    ],
    ids=lambda value: "",
)
def test_what_is_too_large_is_refused_in_one_line(config, reason):
    with pytest.raises(ValueError, match=f"^{reason}.* GiB: expected at most the 16 GiB") as raises:
        check_size(config, vocabulary_size=100)
    assert "\n" not in str(raises.value)


@pytest.mark.parametrize(
    "config",
    [
        fitted(),
        fitted("ce", FitConfig(guide="low_rank")),
        fitted(layers=12, heads=12, width=768, block=256),  # GPT-2's size: 85 million parameters
        sampled(layers=1, width=16, heads=1),
        SampleRunConfig(latent=LatentEmbeddingsConfig()),
    ],
    ids=lambda value: "",
)
def test_what_fits_is_let_pass(config):
    check_size(config, vocabulary_size=100)


def test_a_run_that_is_too_large_is_not_begun(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"chains of \[model\] would take"):
        sample_run(sampled(layers=10**9), out)
    assert not out.exists()


def test_the_attention_stage_of_a_model_without_one_is_refused_where_it_is_fitted():
    check_size(fitted("ce", prior_rank=10**8), vocabulary_size=100)  # has none
    check_stage(width=128, rank=16, block=64)
    with pytest.raises(ValueError, match=r"attention stage of model.prior_rank would take .* GiB"):
        check_stage(width=128, rank=10**8, block=64)


@pytest.mark.parametrize(("written", "expected"), [("1073741824\n", GIB), ("max\n", None)])
def test_the_memory_is_that_of_the_container(tmp_path, monkeypatch, written, expected):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = tmp_path / "memory.max"
    limit.write_text(written)
    monkeypatch.setattr(memory, "_LIMITS", (limit, tmp_path / "none"))
    assert memory.host_memory() == (machine if expected is None else expected)
    with pytest.raises(ValueError, match=r"arrays would take .* of this machine's memory"):
        memory.check_memory("arrays", 2**60)


def test_what_a_published_model_takes_is_counted(monkeypatch):
    """The published parameters, what moves with gradient and two moments, and a part of a step."""
    sizes = {"width": 6, "layers": 2, "heads": 2, "key_heads": 1, "head_width": 4, "hidden": 5}
    network = DecoderNetwork(DecoderConfig(vocabulary=7, context=8, tied=True, **sizes), 8)
    fit = TuneFitConfig(
        trainable="adapters", adapter_rank=3, batch=4, gradient_accumulation=2, rematerialise=True
    )
    moving = 2 * ((6 + 8) * 3 + (6 + 4) * 3)
    step = 2 * ((8 * 8 * 6 + 2 * 8**2) + 8 * 6) + 8 * 7
    expected = 1000 + 4 * (4 * moving + step)
    assert check_tuned_size(TuneConfig(fit=fit), network, 1000) == expected
    monkeypatch.setattr(config_memory, "_memory", lambda: 1000)
    with pytest.raises(ValueError, match="optimizer state of the published model would take"):
        check_tuned_size(TuneConfig(fit=fit), network, 1000)
    # Each part has room, and both have not.
    monkeypatch.setattr(config_memory, "_memory", lambda: expected - 4)
    with pytest.raises(ValueError, match=r"model and a step of fit\.batch would take"):
        check_tuned_size(TuneConfig(fit=fit), network, 1000)
