"""Compute the logits of tiny checkpoints with transformers, for tests that do without it.

Run it at the root of a checkout, in an environment with torch and transformers:

    python -m tests.support.make_decoder_references

It writes a file for each checkpoint into tests/support/decoder_references: the logits at some
positions, the names and shapes of the tensors, and the config.json that transformers itself saves.
"""

import json

import torch
import transformers

from tests.support.tiny_checkpoints import (
    CONFIGS,
    POSITIONS,
    REFERENCES,
    random_tensor,
    random_tokens,
)


def make_reference(name):
    given = CONFIGS[name]
    config = transformers.AutoConfig.for_model(**given)
    config._attn_implementation = "eager"  # the others know no soft cap
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for tensor_name, tensor in state.items():
        tensor.copy_(torch.from_numpy(random_tensor(tensor_name, tuple(tensor.shape))))
    tokens = torch.from_numpy(random_tokens(name))
    with torch.no_grad():
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    rounded = [[float(f"{z:.8g}") for z in logits[position].tolist()] for position in POSITIONS]
    if given["model_type"] == "gpt_neox":  # a file has the older name in all versions
        state = {key.replace("lm_head.", "embed_out."): tensor for key, tensor in state.items()}
    return {
        "transformers": transformers.__version__,
        "saved_config": json.loads(config.to_json_string(use_diff=True)),
        "shapes": {key: list(tensor.shape) for key, tensor in state.items()},
        "logits": rounded,
    }


def main():
    REFERENCES.mkdir(exist_ok=True)
    torch.manual_seed(0)
    for name in CONFIGS:
        text = json.dumps(make_reference(name), indent=None, sort_keys=True)
        (REFERENCES / f"{name}.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
