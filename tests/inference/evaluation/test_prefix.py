"""Models that read a token such as <s> before each text, and tokenizers with fewer tokens."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from numpyro import handlers
from tokenizers import processors

from probattn import stability_margin
from probattn.inference import generate, text_margins
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.evaluation.texts import text_tokens
from probattn.inference.exchange.import_decoder import import_decoder
from probattn.models.decoder.attention import attention_layer
from probattn.models.decoder.network import decoder_logits, embed
from probattn.models.objective import ObjectiveConfig
from probattn.models.tuned import TuningConfig, changes_at_start, first_stage, tuned_decoder
from probattn.text.corpora import TextConfig
from tests.support.tiny_decoder import write_folder
from tests.support.tiny_run import tiny_text
from tests.support.tokenizer_files import byte_level

BLOCK = 16
START = 0  # <|end|>
PROMPT = "the token of a"


def imported(folder, name, tokenizer, *, text=None, **options):
    """Import a tiny model with another tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(text or tiny_text()[:600])
    source = write_folder(folder / "source", name)
    (source / "tokenizer.json").write_text(tokenizer)
    data = TextConfig(str(folder / "text.txt"), validation_fraction=0.3)
    options = {"block": BLOCK, "prior_rank": 2, **options}
    return import_decoder(source, folder / "run", data=data, **options).run


def start_and_end():
    """Write a tokenizer that puts a token before a text, and one after it."""
    tokenizer = tokenizers.Tokenizer.from_str(byte_level("smollm").to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A <|end|>", special_tokens=[("<|end|>", START)]
    )
    return tokenizer.to_str()


@pytest.fixture(
    scope="module", name="run", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)]
)
def run_fixture(request, tmp_path_factory):
    return imported(tmp_path_factory.mktemp("prefix"), request.param, start_and_end())


def with_start(tokens):
    return np.concatenate([np.full((*tokens.shape[:-1], 1), START, tokens.dtype), tokens], axis=-1)


def logits_of(run, tokens):
    """Logits after each of some tokens, the start before them."""
    return _logits(run.parameters, with_start(tokens), config=run.network.config)[..., 1:, :]


_logits = jax.jit(decoder_logits, static_argnames="config")


def test_a_text_is_scored_behind_the_token_that_begins_it(run):
    assert run.network.prefix == (START,)
    tokens, _ = text_tokens(run, None)
    scorer = Scorer(run.network, run.vocabulary, tokens)
    targets = tokens[scorer.starts[:, None] + 1 + np.arange(BLOCK)]
    expected = optax.softmax_cross_entropy_with_integer_labels(
        logits_of(run, scorer.inputs), jnp.asarray(targets)
    )
    np.testing.assert_allclose(scorer.losses(run.parameters), expected, rtol=2e-4, atol=2e-5)


def test_margins_are_those_behind_it_and_it_is_named_nowhere(run):
    margins = text_margins(run, stride=BLOCK, details=True)
    tokens, _ = text_tokens(run, None)
    window = margins.window == 0
    x = embed(run.parameters, with_start(tokens[None, :BLOCK]), run.network.config)
    layer = attention_layer(run.parameters["layers"]["0"], run.network.config, 0)
    expected = np.asarray(stability_margin(layer.stage(x)))[0]
    for stage, of_head in zip(margins.stages, expected, strict=True):
        np.testing.assert_allclose(stage.margin[window], of_head[1:], rtol=1e-3, atol=1e-5)
        for past in (stage.covariance, stage.attention):
            assert (past.behind <= margins.position[:, None]).all()
        # It has a part of the attention, so those of the tokens do not sum to one.
        assert stage.attention.share[1].sum() < 1 - 1e-4
    # Of two tokens the second one's past has a spread: it and the start are in it.
    assert any(abs(stage.margin[1] - 1) > 1e-6 for stage in margins.stages)


def test_generation_sees_it_before_every_window(run):
    made = generate(run, PROMPT, length=2 * BLOCK, temperature=0)
    tokens = run.vocabulary.encode(PROMPT).tolist()
    start = max(len(tokens) - (BLOCK - 1), 0)
    found = list(tokens)
    while len(found) < len(tokens) + 2 * BLOCK:
        if len(found) - start == BLOCK:
            start = len(found) - BLOCK // 2
        window = np.zeros(BLOCK, np.int32)  # what follows a token does not change its scores
        window[: len(found) - start] = found[start:]
        scores = logits_of(run, window)[len(found) - start - 1]
        found.append(int(np.argmax(scores[: run.vocabulary.size])))
    assert made.tokens == tuple(run.vocabulary.display(found[len(tokens) :]))


def test_a_fit_predicts_behind_it_and_its_barrier_sees_it(run):
    inputs = run.vocabulary.encode(tiny_text()[:80])[: 2 * BLOCK].reshape(2, BLOCK)
    targets = np.roll(inputs, -1, axis=1)
    objective = ObjectiveConfig("margin", attention="first_layer")
    tuning, start = TuningConfig("first_attention"), run.parameters
    sites = changes_at_start(None, start, run.network.config, tuning)

    @jax.jit
    def log_prob(inputs):
        model = handlers.substitute(handlers.seed(tuned_decoder, 0), sites)
        options = {"network": run.network, "tuning": tuning, "objective": objective}
        traced = handlers.trace(model).get_trace(inputs, targets, start=start, **options)
        return traced["tokens"]["fn"].log_prob(targets)

    expected = -optax.softmax_cross_entropy_with_integer_labels(logits_of(run, inputs), targets)
    np.testing.assert_allclose(log_prob(inputs), expected.sum(-1), rtol=1e-4)
    stage = first_stage(start, run.network.embed(start, inputs), run.network)
    x = embed(start, with_start(inputs), run.network.config)
    whole = attention_layer(start["layers"]["0"], run.network.config, 0).stage(x)
    np.testing.assert_allclose(stability_margin(stage), stability_margin(whole), rtol=1e-4)


def test_heads_have_no_radius(run):
    with pytest.raises(ValueError, match="radius: heads of a published model have none"):
        text_margins(run, radius=True)


def test_a_block_leaves_room_for_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"block is 320: expected at most 319, the context of .*less"
    ):
        imported(tmp_path, "llama", start_and_end(), block=320)
    run = imported(tmp_path, "llama", start_and_end(), block=None)
    assert run.network.block == 319


def test_a_prior_of_more_rank_than_the_model_is_wide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prior_rank is 999: expected at most 20, the width of"):
        imported(tmp_path, "llama", start_and_end(), prior_rank=999)


SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
PIECES = (SPACE, "a", "b", f"{SPACE}a", f"{SPACE}b", "\n")
SENTENCEPIECE = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": None,
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ],
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
    "model": {
        "type": "BPE",
        "vocab": {piece: index for index, piece in enumerate(PIECES)},
        "merges": [[SPACE, "a"], [SPACE, "b"]],
    },
}


def test_tokens_that_the_tokenizer_lacks_are_never_drawn(tmp_path):
    """A tokenizer that drops the first space of a text, and a model with more rows than tokens."""
    run = imported(tmp_path, "llama", json.dumps(SENTENCEPIECE), text="a b a ab ba\n" * 30)
    assert run.network.config.vocabulary > run.vocabulary.size == len(PIECES)
    for options in ({"temperature": 5.0}, {"temperature": 0}, {"top_k": 300}):
        made = generate(run, "a b a", length=20, **options)
        assert "".join(made.tokens) == made.text
