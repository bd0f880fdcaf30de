"""A Llama in float64, written down from its formulas: an oracle that shares no code."""

import math

import numpy as np


class NumpyLlama:
    """Logits, and the residual maps of the heads of the first layer.

    Args:
        config: its config.json.
        tensors: its tensors by Hugging Face's names.
    """

    def __init__(self, config, tensors):
        self.config, self.tensors, self.known = config, tensors, {}
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.width = config.get("head_dim") or config["hidden_size"] // self.heads
        self.embedding = self.read("model.embed_tokens.weight")

    def read(self, name):
        if name not in self.known:
            self.known[name] = np.asarray(self.tensors[name]).astype(np.float64)
        return self.known[name]

    def norm(self, x, name):
        root = np.sqrt(np.mean(x**2, -1, keepdims=True) + self.config["rms_norm_eps"])
        return x / root * self.read(name)

    def turned(self, x, positions):
        half = self.width // 2
        frequencies = self.config.get("rope_theta", 1e4) ** (-np.arange(half) / half)
        angles = np.multiply.outer(positions, frequencies)
        cosine, sine = np.cos(angles), np.sin(angles)
        left, right = x[..., :half], x[..., half:]
        return np.concatenate([left * cosine - right * sine, right * cosine + left * sine], -1)

    def projected(self, name, n, heads):
        """Vectors of every head, (heads, T, width)."""
        matrix = self.read(f"{name}_proj.weight")
        return (n @ matrix.T).reshape(len(n), heads, self.width).swapaxes(0, 1)

    def logits(self, ids):
        x, positions = self.embedding[ids], np.arange(len(ids))
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            n = self.norm(x, f"{prefix}input_layernorm.weight")
            attention = f"{prefix}self_attn."
            query = self.turned(self.projected(f"{attention}q", n, self.heads), positions)
            key = self.turned(self.projected(f"{attention}k", n, self.groups), positions)
            value = self.projected(f"{attention}v", n, self.groups)
            key, value = (np.repeat(each, self.heads // self.groups, 0) for each in (key, value))
            scores = query @ key.swapaxes(1, 2) / math.sqrt(self.width)
            scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed = (weights @ value).swapaxes(0, 1).reshape(len(ids), -1)
            x = x + mixed @ self.read(f"{attention}o_proj.weight").T
            n = self.norm(x, f"{prefix}post_attention_layernorm.weight")
            gate = n @ self.read(f"{prefix}mlp.gate_proj.weight").T
            up = n @ self.read(f"{prefix}mlp.up_proj.weight").T
            down = self.read(f"{prefix}mlp.down_proj.weight")
            x = x + (gate / (1 + np.exp(-gate)) * up) @ down.T
        output = (
            self.embedding if self.config["tie_word_embeddings"] else self.read("lm_head.weight")
        )
        return self.norm(x, "model.norm.weight") @ output.T

    def losses(self, ids):
        """Nats of each of the tokens after the first."""
        scores = self.logits(ids)[:-1]
        highest = scores.max(-1)
        sums = np.log(np.exp(scores - highest[:, None]).sum(-1)) + highest
        return sums - scores[np.arange(len(ids) - 1), ids[1:]]

    def first_stage(self, ids):
        """What the first layer's heads see, (T, d), and their residual maps, one for each head."""
        n = self.norm(self.embedding[ids], "model.layers.0.input_layernorm.weight")
        attention = "model.layers.0.self_attn."
        keys = self.turned(self.projected(f"{attention}k", n, self.groups), np.arange(len(n)))
        queries = self.read(f"{attention}q_proj.weight").reshape(self.heads, self.width, -1)

        def residual(head):
            own, matrix = keys[head // (self.heads // self.groups)], queries[head]

            def at(token, position):
                scores = own[:position] @ self.turned(matrix @ token, position)
                scores = scores / math.sqrt(self.width)
                alpha = np.exp(scores - scores.max())
                return token - alpha / alpha.sum() @ n[:position]

            return at

        return n, [residual(head) for head in range(self.heads)]


def jacobian(function, token, step=1e-5):
    """Of a function of a vector, by central differences."""
    columns = [
        (function(token + step * unit) - function(token - step * unit)) / (2 * step)
        for unit in np.eye(len(token))
    ]
    return np.stack(columns, -1)
