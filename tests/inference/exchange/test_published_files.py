"""The small files beside a published model: kept at import, and written back at export."""

import json
import os
import re
import shutil

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects

from probattn.inference import TuneConfig, TuneFitConfig, fit
from probattn.inference.exchange.export_decoder import export_decoder
from probattn.inference.exchange.exported_tokenizers import published_files, tokenizer_settings
from probattn.inference.exchange.import_decoder import import_decoder
from probattn.inference.pretrained import checkpoint as module
from probattn.inference.pretrained.checkpoint import open_checkpoint
from probattn.inference.pretrained.errors import PretrainedError
from probattn.inference.runs.run import load_run
from probattn.models import ObjectiveConfig
from probattn.text.corpora import TextConfig
from tests.support.gguf_bytes import ARRAY, STRING, gguf, key, tensor
from tests.support.refusals import refusal
from tests.support.tiny_decoder import write_folder
from tests.support.tiny_run import tiny_text
from tests.support.tokenizer_files import byte_level, definition

FILES = {
    "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer",\r\n\t"eos_token": "<|end|>"}',
    "special_tokens_map.json": b'{"eos_token": {"content": "<|end|>", "lstrip": false}}',
    "added_tokens.json": b'{"<|end|>": 0}\n\n',
    "chat_template.json": b'{"chat_template": "{{ messages }}"}',
    "chat_template.jinja": "{% for é in messages %}\r\n{% endfor %}".encode(),
    "generation_config.json": b'{"temperature":0.60, "eos_token_id": [0, 2]}',
}
STUB = b'{\n  "tokenizer_class": "PreTrainedTokenizerFast"\n}\n'  # of earlier versions
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


@pytest.fixture(name="data")
def data_fixture(tmp_path):
    (tmp_path / "text.txt").write_text(tiny_text()[:1200])
    return TextConfig(str(tmp_path / "text.txt"), validation_fraction=0.3)


@pytest.fixture(name="source")
def source_fixture(tmp_path):
    return write_files(write_folder(tmp_path / "source", "smollm"), FILES)


def write_files(folder, files):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def bring_in(source, out, data):
    return import_decoder(source, out, data=data, block=16, prior_rank=2).run


def files_of(folder):
    """All files of a folder but the model itself."""
    names = {path.name for path in folder.iterdir()}
    names -= {"config.json", "tokenizer.json", "model.safetensors"}
    return {name: (folder / name).read_bytes() for name in names}


def settings_of(folder):
    return json.loads((folder / "tokenizer_config.json").read_text())


def test_they_are_kept_and_written_back_byte_by_byte(source, data, tmp_path):
    (source / "README.md").write_text("not one of them")
    run = bring_in(source, tmp_path / "run", data)
    assert files_of(run.path / "model") == FILES
    exported = export_decoder(run, tmp_path / "exported")
    assert files_of(exported) == FILES
    again = bring_in(exported, tmp_path / "again", data)
    assert files_of(again.path / "model") == FILES


@pytest.mark.usefixtures("quick_compilation")
def test_a_tuned_run_takes_them_from_its_base_wherever_that_lies(source, data, tmp_path):
    base = bring_in(source, tmp_path / "base", data)
    tuning = TuneFitConfig(steps=1, batch=1, trainable="adapters", adapter_rank=1)
    config = TuneConfig(data, objective=ObjectiveConfig("ce"), fit=tuning)
    tuned = fit(config, tmp_path / "tuned", base=base.path).run
    assert files_of(export_decoder(tuned, tmp_path / "exported")) == FILES
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(base.path, moved)
    shutil.rmtree(base.path)
    tuned = fit(config, tuned.path, base=moved, resume=True).run
    assert tuned.base.path == moved
    exported = export_decoder(tuned, tmp_path / "exported2")
    assert files_of(exported) == FILES
    assert json.loads((exported / "config.json").read_text())["dtype"] == "float32"


def test_a_run_of_an_earlier_version_opens_and_names_its_tokens_at_export(source, data, tmp_path):
    for name in FILES:
        (source / name).unlink()
    run = bring_in(source, tmp_path / "run", data)
    (run.path / "model" / "tokenizer_config.json").write_bytes(STUB)
    run = load_run(run.path)
    checksum = run.checksum
    exported = export_decoder(run, tmp_path / "exported")
    assert settings_of(exported) == SETTINGS | {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    assert files_of(run.path / "model") == {"tokenizer_config.json": STUB}
    assert load_run(run.path).checksum == checksum


DAMAGED = {
    "no JSON": ("generation_config.json", b"{", "holds no JSON: "),
    "no object": ("tokenizer_config.json", b"[]", "holds a JSON list: expected an object"),
    "twice": ("special_tokens_map.json", b'{"a": 1, "a": 2}', "names 'a' twice"),
    "deep": ("added_tokens.json", b'{"a":' * 50_000, "holds no JSON: "),
    "no text": ("chat_template.jinja", b"\xff\xfe", "holds no text in UTF-8: "),
    "too large": ("chat_template.jinja", b"x" * 3001, "has more than 3000 bytes: expected a small"),
    "too large JSON": ("added_tokens.json", b"{}" + b" " * 3000, "has more than 3000 bytes"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_one_is_refused_and_nothing_is_left_behind(
    source, data, tmp_path, monkeypatch, case
):
    name, content, reason = DAMAGED[case]
    if "large" in case:
        monkeypatch.setattr(module, "_MOST_BESIDE", 3000)
    run = bring_in(source, tmp_path / "run", data)
    for folder, function in (
        (source, lambda: bring_in(source, tmp_path / "other", data)),
        (run.path / "model", lambda: export_decoder(load_run(run.path), tmp_path / "other")),
    ):
        (folder / name).write_bytes(content)
        message = refusal(PretrainedError, function)
        assert message.startswith(f"{folder / name}: {reason}")
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "source", "run"}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "is no file: expected one, or nothing of this name"),
        (os.mkdir, "is no file: expected one, or nothing of this name"),
        (lambda path: path.symlink_to("nowhere"), "cannot be read: No such file or directory"),
    ],
)
def test_what_is_no_file_is_refused(source, make, reason):
    path = source / "chat_template.jinja"
    path.unlink()
    make(path)
    message = refusal(PretrainedError, published_files, open_checkpoint(source))
    assert message == f"{path}: {reason}"


def test_the_hub_is_asked_for_them_and_may_have_none(source, tmp_path, monkeypatch):
    """By the hub's own filter of names, from a model that has some of them."""
    for name in ("added_tokens.json", "chat_template.json"):
        (source / name).unlink()
    (source / "training_args.bin").write_bytes(b"")

    def download(name, *, revision, allow_patterns, ignore_patterns):
        names = [path.name for path in source.iterdir()]
        cache = tmp_path / name.replace("/", "--")
        cache.mkdir()
        for each in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            shutil.copy(source / each, cache / each)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = published_files(open_checkpoint("hf:owner/some"))
    assert found == {
        name: data
        for name, data in FILES.items()
        if name not in ("added_tokens.json", "chat_template.json")
    }
    assert not (tmp_path / "owner--some" / "training_args.bin").exists()
    for name in found:
        (source / name).unlink()
    assert published_files(open_checkpoint("hf:owner/none")).keys() == {"tokenizer_config.json"}


VOCABULARY = {
    "model": {"vocab": {"a": 0, "<s>": 1, "<unk>": 2}, "unk_token": "<unk>"},
    "added_tokens": [{"id": 3, "content": "</s>"}],
}


@pytest.mark.parametrize(
    ("config", "special", "expected"),
    [
        ({}, {}, {}),
        (
            {"bos_token_id": 1, "eos_token_id": [3, 1], "pad_token_id": 3},
            {},
            {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
        ),
        ({"bos_token_id": 4, "eos_token_id": True, "pad_token_id": []}, {}, {}),
        (
            {"eos_token_id": 3},
            {"eos_token": "<s>", "pad_token": {"content": "</s>"}, "bos_token": ["a"]},
            {"eos_token": "<s>", "pad_token": "</s>"},
        ),
        # A token without an id would be added to the vocabulary, and the model has no row for it.
        ({}, {"pad_token": "[PAD]", "eos_token": {"content": 3}, "unk_token": None}, {}),
    ],
)
def test_settings_name_the_tokens_that_are_known(config, special, expected):
    found = tokenizer_settings(VOCABULARY, config, special)
    assert found.keys() == {"tokenizer_config.json"}
    settings = json.loads(found["tokenizer_config.json"])
    assert settings == {**SETTINGS, "unk_token": "<unk>", **expected}


def test_an_unknown_token_without_an_id_is_not_named():
    model = VOCABULARY["model"] | {"unk_token": "[UNK]"}
    found = tokenizer_settings(VOCABULARY | {"model": model}, {})
    assert json.loads(found["tokenizer_config.json"]) == SETTINGS


def test_a_map_of_special_tokens_counts_where_there_are_no_settings(source, data, tmp_path):
    (source / "tokenizer_config.json").unlink()
    (source / "special_tokens_map.json").write_text('{"pad_token": "<|end|>"}')
    run = bring_in(source, tmp_path / "run", data)
    assert settings_of(run.path / "model")["pad_token"] == "<|end|>"


def test_a_gguf_file_names_its_tokens_and_has_its_chat_template(data, tmp_path):
    described = definition(byte_level("smollm"))["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].__getitem__)
    merges = [" ".join(pair) for pair in described["merges"]]
    width, template = 2, "{% for é in messages %}\n{% endfor %}"
    numbers = {"context_length": 32, "embedding_length": width, "feed_forward_length": width}
    keys = [
        key("general.architecture", STRING, "llama"),
        *(key(f"llama.{name}", 4, value) for name, value in numbers.items()),
        *(key(f"llama.{name}", 4, 1) for name in ("block_count", "attention.head_count")),
        key("llama.attention.layer_norm_rms_epsilon", 6, 1e-5),
        key("tokenizer.ggml.model", STRING, "gpt2"),
        key("tokenizer.ggml.pre", STRING, "smollm"),
        key("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
        key("tokenizer.ggml.merges", ARRAY, (STRING, merges)),
        *(
            key(f"tokenizer.ggml.{name}_token_id", 4, value)
            for name, value in {"bos": 0, "eos": 3, "padding": 4, "unknown": 5, "eot": 6}.items()
        ),
        key("tokenizer.chat_template", STRING, template),
    ]
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {
        **{"token_embd": (len(tokens), width), "output_norm": (width,)},
        **{f"blk.0.{name}": (width, width) for name in square},
        **{f"blk.0.{name}": (width,) for name in ("attn_norm", "ffn_norm")},
    }
    headers, parts = [], b""
    for name, shape in shapes.items():
        headers.append(tensor(f"{name}.weight", shape, 0, len(parts)))
        values = np.ones(shape, "f4").tobytes()
        parts += values + bytes(-len(values) % 32)
    (tmp_path / "x.gguf").write_bytes(gguf(keys, headers, parts))
    run = bring_in(tmp_path / "x.gguf", tmp_path / "run", data)
    exported = export_decoder(run, tmp_path / "exported")
    assert files_of(exported) == files_of(run.path / "model")
    assert (exported / "chat_template.jinja").read_text() == template
    names = {"bos_token": 0, "eos_token": 3, "pad_token": 4, "unk_token": 5}
    expected = {name: tokens[index] for name, index in names.items()}
    assert settings_of(exported) == SETTINGS | expected
    assert json.loads((exported / "special_tokens_map.json").read_text()) == expected


def test_a_fit_has_no_tokens_to_name(tiny_run, tmp_path):
    exported = export_decoder(tiny_run, tmp_path / "exported")
    assert files_of(exported).keys() == {"tokenizer_config.json"}
    assert settings_of(exported) == SETTINGS


def test_all_of_a_folder_is_on_the_disk_before_it_counts(source, data, tmp_path, monkeypatch):
    """A name is there after a power failure if its folder was brought to the disk with it."""
    synced, sync = {}, os.fsync

    def noted(descriptor):
        sync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            names = set(os.listdir(path))
            synced[path] = {name for name in names if not re.fullmatch(r"lock|\..*", name)}
            if path == str(tmp_path / "run") and "config.toml" in names:
                described.append(dict(synced))

    described = []
    monkeypatch.setattr(os, "fsync", noted)
    run = bring_in(source, tmp_path / "run", data)
    whole = {"config.json", "tokenizer.json", "model.safetensors", *FILES}
    # Before the run counts as one.
    assert described[0][str(run.path / "model")] == whole
    assert "model" in described[0][str(run.path)]
    (tmp_path / "there").mkdir()
    export_decoder(run, tmp_path / "there" / "exported")
    [folder] = [path for path in synced if os.path.dirname(path) == str(tmp_path / "there")]
    assert synced[folder] == whole
    assert synced[str(tmp_path / "there")] == {"exported"}
