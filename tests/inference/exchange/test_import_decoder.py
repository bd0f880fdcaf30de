"""Imported models: the run holds the model bit by bit, and is measured as any other."""

import json
import math
import re

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from probattn.inference import generate, load_run, text_margins
from probattn.inference.exchange import import_decoder as module
from probattn.inference.exchange.export_decoder import export_decoder
from probattn.inference.exchange.import_decoder import import_decoder
from probattn.inference.pretrained.tensors import Tensors
from probattn.inference.runs.files import RunError
from probattn.text.corpora import TextConfig
from tests.support.numpy_llama import NumpyLlama, jacobian
from tests.support.tiny_decoder import imported, write_folder


@pytest.fixture(scope="module", name="llama")
def llama_fixture(tmp_path_factory):
    """A run of a model with rotary positions and keys that heads share, and its folder."""
    folder = tmp_path_factory.mktemp("llama")
    return imported(folder, "smollm"), folder


def tensors_of(folder):
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_the_run_holds_the_model_bit_by_bit(llama):
    found, folder = llama
    source, stored = (tensors_of(folder / each) for each in ("source", "run/model"))
    assert source.keys() == stored.keys()
    for name, tensor in source.items():
        assert stored[name].dtype == tensor.dtype
        assert stored[name].tobytes() == tensor.tobytes()
    for name in ("config.json", "tokenizer.json"):
        one, other = (
            json.loads((folder / each / name).read_text()) for each in ("source", "run/model")
        )
        assert one == other
    assert load_run(folder / "run") == found.run


def test_margins_of_heads_are_those_of_finite_differences(llama):
    """Of rotary positions and shared keys, at positions of the first window."""
    found, folder = llama
    margins = text_margins(found.run)
    run = found.run
    ids = run.vocabulary.encode("".join(margins.tokens))[: run.network.block]
    config = json.loads((folder / "source/config.json").read_text())
    n, residuals = NumpyLlama(config, tensors_of(folder / "source")).first_stage(ids)
    labels = [stage.label for stage in margins.stages]
    assert labels == [f"layer 1 head {head}" for head in (1, 2, 3)]
    first = margins.window == 0
    for stage, residual in zip(margins.stages, residuals, strict=True):
        for position in (2, 5, 11, 15):
            block = jacobian(lambda token, t=position, f=residual: f(token, t), n[position])
            sign, log_abs = np.linalg.slogdet(block)
            assert sign > 0
            assert stage.log_det[first][position] == pytest.approx(log_abs, abs=2e-4)
            eigenvalues = np.linalg.eigvals(block)
            folded = np.any((abs(eigenvalues.imag) < 1e-9) & (eigenvalues.real <= 0))
            smallest = np.linalg.svd(block, compute_uv=False)[-1] * (-1 if folded else 1)
            assert stage.margin[first][position] == pytest.approx(smallest, abs=2e-4)
            assert stage.certificate[first][position] >= np.max(1 - eigenvalues.real) - 1e-4
        assert np.isnan(stage.embedding_margin).all()


def test_the_score_is_that_of_whole_windows(llama):
    found, _ = llama
    run, text = found.run, "".join(text_margins(found.run).tokens)
    ids = run.vocabulary.encode(text)
    losses = {}
    for start in [*range(0, len(ids) - 17, 16), len(ids) - 17]:
        window, targets = ids[start : start + 16], ids[start + 1 : start + 17]
        scores = np.asarray(
            run.network.logits(run.parameters, run.network.embed(run.parameters, window[None]))
        )
        scores = scores[0].astype(float)
        shifted = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
        for place in range(16):
            losses.setdefault(start + place, shifted[place] - scores[place, targets[place]])
    assert found.score.tokens == len(losses)
    assert found.score.cross_entropy == pytest.approx(np.mean(list(losses.values())), rel=1e-5)
    characters = run.vocabulary.characters(ids[1:])
    assert found.score.bpc == pytest.approx(
        sum(losses.values()) / math.log(2) / characters, rel=1e-5
    )


def test_generation_with_a_cache_takes_the_most_probable_tokens(llama):
    """Beyond a block, where the window moves on and is read anew."""
    run = llama[0].run
    made = generate(run, "of a margin", length=25, temperature=0)
    tokens = [int(token) for token in run.vocabulary.encode("of a margin")]
    given, start, block = len(tokens), 0, run.network.block
    for _ in range(25):
        if len(tokens) - start == block:
            start = len(tokens) - block // 2
        window = np.array(tokens[start:])[None]
        scores = run.network.logits(run.parameters, run.network.embed(run.parameters, window))
        tokens.append(int(np.argmax(scores[0, -1])))
    assert made.text == run.vocabulary.decode(np.array(tokens[given:]))
    assert np.isfinite(made.margin).all()


def test_margins_read_the_tensors_that_they_need(llama, monkeypatch):
    run, read = load_run(llama[0].run.path), set()
    plain = Tensors.__getitem__

    def noted(self, name):
        read.add(name)
        return plain(self, name)

    monkeypatch.setattr(Tensors, "__getitem__", noted)
    text_margins(run)
    layer = "model.layers.0."
    assert read - {"lm_head.weight"} == {
        "model.embed_tokens.weight",
        f"{layer}input_layernorm.weight",
        f"{layer}self_attn.q_proj.weight",
        f"{layer}self_attn.k_proj.weight",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "gemma3_text",
        *(pytest.param(n, marks=pytest.mark.nightly) for n in ("gpt_neox", "qwen3")),
    ],
)
def test_every_layer_of_every_family_has_margins(tmp_path, name):
    run = imported(tmp_path, name).run
    found = text_margins(run, all_layers=True)
    shape = run.network.config
    assert len(found.stages) == shape.layers * shape.heads
    assert found.stages[-1].label == f"layer {shape.layers} head {shape.heads}"
    for stage in found.stages:
        assert np.isfinite(stage.margin).all()
        # A norm of the queries has a derivative without bound, so nothing is proved of every token.
        assert np.isnan(stage.certificate).all() == run.network.config.query_norm


def test_the_post_hoc_prior_of_a_model_is_fitted_on_request(llama):
    found = text_margins(llama[0].run, post_hoc=True)
    assert found.stages[0].label == "post hoc"
    assert np.isfinite(found.stages[0].embedding_margin[found.position >= 2]).all()
    assert found.certificates[0].rho >= np.max(found.stages[0].certificate)


def test_import_export_import_is_the_identity(llama, tmp_path):
    found, folder = llama
    exported = export_decoder(found.run, tmp_path / "exported")
    again = import_decoder(exported, tmp_path / "again", data=found.run.config.data, block=16)
    for name, tensor in tensors_of(folder / "source").items():
        assert (
            load_file(tmp_path / "again/model/model.safetensors")[name].tobytes()
            == tensor.tobytes()
        )
    assert again.score == found.score
    assert again.run.vocabulary == found.run.vocabulary
    assert json.loads((exported / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]


def test_large_models_go_to_several_files(llama, tmp_path, monkeypatch):
    from probattn.inference.exchange import hugging_face_folders

    monkeypatch.setattr(hugging_face_folders, "_MOST_BYTES", 20_000)
    found, folder = llama
    exported = export_decoder(found.run, tmp_path / "exported")
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    for name, tensor in tensors_of(folder / "source").items():
        assert load_file(exported / index[name])[name].tobytes() == tensor.tobytes()


REFUSED = {
    "longer block": ({"block": 400}, {}, "block is 400: expected at most 320, the context of"),
    "short block": ({"block": 2}, {}, "imported.block is 2: expected an integer >= 3"),
    "missing tensor": (
        {},
        {"num_hidden_layers": 3},
        "model.layers.2.input_layernorm.weight is missing",
    ),
    "wrong shape": ({}, {"intermediate_size": 34}, r"mlp.gate_proj.weight has shape (33, 20)"),
    "unknown option": ({}, {"new_option": 1}, "new_option"),
    "unknown family": ({}, {"model_type": "bert"}, "model_type"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_nothing_behind(tmp_path, case):
    options, changes, line = REFUSED[case]
    source = write_folder(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=re.escape(line)):
        import_decoder(source, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_text_that_the_tokenizer_lacks_is_named(tmp_path):
    source = write_folder(tmp_path / "source")
    definition = json.loads((source / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary["!!!!"] = vocabulary.pop("z")  # a byte-level vocabulary that lacks a byte
    (source / "tokenizer.json").write_text(json.dumps(definition))
    text = tmp_path / "text.txt"
    text.write_text("a b c z " * 40)
    with pytest.raises(ValueError, match="'z'"):
        import_decoder(source, tmp_path / "run", data=TextConfig(str(text)), block=8)


def test_a_failed_import_brings_the_old_run_back(llama, tmp_path, monkeypatch):
    found, folder = llama
    import_decoder(folder / "source", tmp_path / "run", data=found.run.config.data, block=8)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_folder", full)
    with pytest.raises(RunError, match="holds another run"):
        import_decoder(folder / "source", tmp_path / "run", data=found.run.config.data)
    with pytest.raises(OSError, match="No space left"):
        import_decoder(
            folder / "source", tmp_path / "run", data=found.run.config.data, overwrite=True
        )
    assert load_run(tmp_path / "run").network.block == 8


def test_a_damaged_model_is_refused_when_it_is_opened(llama, tmp_path):
    found, folder = llama
    run = import_decoder(
        folder / "source", tmp_path / "run", data=found.run.config.data, block=8
    ).run
    weights = tensors_of(run.path / "model")
    weights.pop("model.norm.weight")
    save_file(weights, run.path / "model/model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is missing"):
        _ = load_run(run.path).parameters
    (run.path / "model/tokenizer.json").unlink()
    with pytest.raises(RunError, match=r"holds no tokenizer\.json"):
        load_run(run.path)


def test_a_configuration_without_a_source_is_refused_in_one_line(llama, tmp_path):
    found, folder = llama
    run = import_decoder(
        folder / "source", tmp_path / "run", data=found.run.config.data, block=8
    ).run
    (run.path / "config.toml").write_text("# edited\n[imported]\nblock = 8\n")
    with pytest.raises(RunError, match=r"damaged run: .*imported\.source is empty") as raises:
        load_run(run.path)
    assert "\n" not in str(raises.value)
