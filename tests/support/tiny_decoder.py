"""A tiny published model: a folder as Hugging Face has them, of any family, and a run of it."""

import json

from safetensors.numpy import save_file

from probattn.inference.exchange.import_decoder import import_decoder
from probattn.inference.pretrained.architectures import decoder_config
from probattn.inference.pretrained.parameter_names import ParameterNames
from probattn.text.corpora import TextConfig
from tests.support.tiny_checkpoints import CONFIGS, random_tensor
from tests.support.tiny_run import tiny_text
from tests.support.tokenizer_files import byte_level

SIZE = 330  # of the vocabulary
TEXT_LENGTH = 1200
TOKENIZERS = {"gpt2": "gpt-2", "gpt_neox": "olmo", "llama": "smollm", "qwen3": "qwen2"}


def write_folder(folder, name="llama", **changes):
    """Write a folder with the tensors that `tiny_checkpoints` has for a family."""
    config = {**CONFIGS[name], "vocab_size": SIZE, **changes}
    kind = config["model_type"]
    names = ParameterNames(kind, decoder_config(config))
    tensors = {key: random_tensor(key, shape) for key, shape in names.shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    byte_level(TOKENIZERS.get(kind, "smollm")).save(str(folder / "tokenizer.json"))
    return folder


def imported(folder, name="llama", **options):
    """Import such a model, to be measured on the text of the tiny runs."""
    text = folder / "text.txt"
    folder.mkdir(parents=True, exist_ok=True)
    text.write_text(tiny_text()[:TEXT_LENGTH])
    source = write_folder(folder / "source", name)
    data = TextConfig(str(text), validation_fraction=0.3)
    options = {"block": 16, "prior_rank": 2, **options}
    return import_decoder(source, folder / "run", data=data, **options)
