"""Exported runs: other libraries read from the folder what the run has."""

import json

import numpy as np
import pytest
import tokenizers

from probattn.inference.config_sampling import SampleRunConfig
from probattn.inference.exchange.export_decoder import export_decoder
from probattn.inference.exchange.exported_tokenizers import tokenizer_definition
from probattn.inference.exchange.import_decoder import import_decoder
from probattn.inference.runs.files import RunError
from probattn.inference.runs.run import PosteriorRun
from probattn.models import LanguageModelConfig, LatentEmbeddingsConfig
from probattn.models.decoder.network import decoder_logits
from probattn.models.networks import TransformerNetwork
from probattn.models.transformer_decoder import as_decoder
from probattn.text.corpora import TextConfig
from probattn.text.vocabulary import build_vocabulary
from tests.support import numpy_network
from tests.support.tiny_run import tiny_text


@pytest.mark.parametrize("tokenizer", ["character", "frequent:9", "bpe:300"])
def test_an_exported_tokenizer_encodes_as_the_vocabulary(tokenizer):
    """By the library itself, lines of several kinds and characters without a token included."""
    text = tiny_text() + "\n\n  indented   text \n\tünïcödé 'll 123 \n  \n x"
    vocabulary = build_vocabulary(tokenizer, text)
    definition = json.dumps(tokenizer_definition(vocabulary))
    library = tokenizers.Tokenizer.from_str(definition)
    assert library.get_vocab_size() == vocabulary.size
    encoded = library.encode(text, add_special_tokens=False).ids
    assert encoded == vocabulary.encode(text).tolist()
    if tokenizer != "frequent:9":
        assert library.decode(encoded) == text


@pytest.mark.parametrize("cap", [None, 0.9])
def test_the_decoder_of_a_network_has_its_logits(cap):
    config = LanguageModelConfig(
        numpy_network.LAYERS,
        numpy_network.HEADS,
        numpy_network.WIDTH,
        numpy_network.BLOCK,
        spectral_cap=cap,
    )
    parameters, tokens = numpy_network.random_parameters(3), numpy_network.random_tokens(1)
    network = TransformerNetwork(config)
    decoder, tree = as_decoder(parameters, config)
    expected = network.logits(parameters, network.embed(parameters, tokens))
    np.testing.assert_allclose(decoder_logits(tree, tokens, decoder), expected, atol=1e-12)


def test_an_exported_fit_is_read_as_what_it_was(tiny_run, tmp_path):
    folder = export_decoder(tiny_run, tmp_path / "exported")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    text = tmp_path / "text.txt"
    text.write_text(tiny_text())
    data = TextConfig(str(text), validation_fraction=0.1)
    again = import_decoder(folder, tmp_path / "again", data=data, prior_rank=2)
    assert again.run.network.block == tiny_run.config.model.block
    tokens = tiny_run.vocabulary.encode(tiny_text()[:8])[None]
    assert again.run.vocabulary.encode(tiny_text()[:8]).tolist() == tokens[0].tolist()
    one, other = (
        run.network.logits(run.parameters, run.network.embed(run.parameters, tokens))
        for run in (tiny_run, again.run)
    )
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_folder_that_holds_something_is_refused(tiny_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="expected a new or an empty folder"):
        export_decoder(tiny_run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_export_leaves_nothing_behind(tiny_run, tmp_path, monkeypatch):
    from probattn.inference.exchange import export_decoder as module

    def full(folder, *arguments):
        folder.joinpath("config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_folder", full)
    with pytest.raises(OSError, match="No space left"):
        export_decoder(tiny_run, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_a_posterior_has_no_single_network(tiny_run, tmp_path):
    config = SampleRunConfig(latent=LatentEmbeddingsConfig())
    run = PosteriorRun(tmp_path, config, tiny_run.data, tiny_run.vocabulary)
    with pytest.raises(RunError, match="is a sampled posterior"):
        export_decoder(run, tmp_path / "exported")
