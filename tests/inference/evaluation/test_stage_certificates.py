"""What no text can do to a stage, and the texts that do what it does not rule out."""

import math
from dataclasses import replace

import numpy as np
import pytest

from probattn import certificate, infeasible
from probattn.inference import fit, load_run, text_margins
from probattn.inference.evaluation import stage_certificates
from probattn.inference.evaluation.attention_stages import stage_table, stages
from probattn.inference.evaluation.folding_texts import folding_text, folding_texts
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.evaluation.stage_certificates import (
    stage_certificate,
    trained_certificate,
)
from probattn.inference.evaluation.texts import text_tokens
from probattn.models import transformer
from probattn.models.networks import TransformerNetwork
from tests.support.tiny_run import BLOCK, LABELS, stage_arguments, tiny_config


@pytest.fixture(name="trained", scope="module")
def trained_fixture(tiny_run):
    return next(stages(tiny_run, None))


def test_no_text_has_a_larger_certificate(tiny_run, trained):
    found = stage_certificate(tiny_run, trained)
    rng = np.random.default_rng(0)
    table = stage_table(tiny_run, trained)
    texts = rng.integers(0, tiny_run.vocabulary.size, (64, BLOCK))
    contexts = table[texts, np.arange(BLOCK)]
    rho = certificate(contexts, trained.w_query, trained.w_key, bound=trained.bound)
    assert np.all(rho <= found.rho)
    assert found.rho <= 4 * rho.max()  # random texts come near


def test_the_table_is_what_the_stage_sees(tiny_run, trained):
    x, _, _ = stage_arguments(tiny_run, np.array([[3, 1, 2]]))["trained"]
    table = stage_table(tiny_run, trained)
    np.testing.assert_allclose(table[[3, 1, 2], [0, 1, 2]], x[0], rtol=1e-5)


def test_a_text_folds_a_head_and_none_a_stage_that_is_proved(tiny_run, trained):
    *_, head = stages(tiny_run, None)
    assert stage_certificate(tiny_run, head).pair_rho > 1
    found = folding_text(tiny_run, head)
    assert found is not None
    assert found.label == head.label
    assert found.margin <= 0
    np.testing.assert_array_equal(tiny_run.vocabulary.encode(found.text), found.tokens)
    x = stage_table(tiny_run, head)[found.tokens, np.arange(BLOCK)]
    assert infeasible(x, head.w_query, head.w_key)[-1]
    assert stage_certificate(tiny_run, trained).rho < 1
    assert folding_text(tiny_run, trained) is None


def test_the_search_looks_only_where_no_proof_stands(tiny_run):
    *others, head = (stage_certificate(tiny_run, stage) for stage in stages(tiny_run, None))
    safe = [replace(each, rho=0.5) for each in (head, *others)]  # the first post hoc
    found = folding_texts(tiny_run, [*safe, head])
    assert list(found) == [head.label]
    assert found[head.label].margin <= 0


def test_a_table_too_large_for_the_memory_is_not_made(tiny_run, trained, monkeypatch):
    numbers = tiny_run.vocabulary.size * BLOCK * tiny_run.config.model.width
    monkeypatch.setattr(stage_certificates, "MOST_NUMBERS", numbers - 1)
    monkeypatch.delattr(stage_certificates, "stage_table")
    found = stage_certificate(tiny_run, trained)
    assert math.isnan(found.rho)
    assert trained_certificate(tiny_run) is None
    everything = [found] * len(LABELS)
    assert folding_texts(tiny_run, everything) == {}


def fitted(folder, steps, **model):
    """Fit a tiny run for some steps, with this of the model changed."""
    config = tiny_config(folder)
    times = {"steps": steps, "eval_every": steps // 2, "checkpoint_every": steps // 2}
    changed = {"model": replace(config.model, **model), "fit": replace(config.fit, **times)}
    return fit(replace(config, **changed), folder / "run").run


@pytest.mark.slow
def test_nothing_is_proved_of_heads_behind_another_layer(tmp_path):
    """What enters them depends on the whole context, and not on a symbol and its position."""
    run = fitted(tmp_path, 20, layers=2)
    margins = text_margins(run, all_layers=True)
    rho = {proved.label: proved.rho for proved in margins.certificates}
    assert not math.isnan(rho["layer 1 head 1"])
    assert math.isnan(rho["layer 2 head 1"])
    assert set(folding_texts(run, margins.certificates)) <= set(rho) - {"layer 2 head 1"}


@pytest.mark.slow
def test_a_capped_run_goes_on_and_every_stage_of_it_is_proved(tmp_path):
    path = fitted(tmp_path, 100, spectral_cap=0.9).path
    file = path / "config.toml"
    file.write_text(file.read_text("utf-8").replace("\nsteps = 100\n", "\nsteps = 150\n"), "utf-8")
    longer = load_run(path).config
    assert longer.model.spectral_cap == 0.9
    run = fit(longer, path, resume=True).run
    assert run.metrics()[-1]["step"] == 150
    others = replace(longer, model=replace(longer.model, spectral_cap=0.8))
    with pytest.raises(ValueError, match=r"model.spectral_cap: 0.9 -> 0.8"):
        fit(others, path, resume=True)
    labels = []
    for stage in stages(run, None):
        proved = stage_certificate(run, stage)
        assert proved.rho <= 0.9
        labels.append(proved.label)
    assert labels == ["trained", "layer 1 head 1", "layer 1 head 2"]
    # What is scored is the capped network.
    tokens, _ = text_tokens(run, None)
    scorer = Scorer(run.network, run.vocabulary, tokens)
    capped = transformer.capped(run.parameters, heads=run.config.model.heads, cap=0.9)
    free = Scorer(
        TransformerNetwork(replace(run.config.model, spectral_cap=None)), run.vocabulary, tokens
    )
    scored = scorer.score(run.parameters).bpc
    assert scored == pytest.approx(free.score(capped).bpc, rel=1e-6)
    assert scored != pytest.approx(free.score(run.parameters).bpc, rel=1e-3)
