"""The network in loops of plain NumPy, small enough to be compared with."""

import numpy as np

VOCABULARY, LAYERS, HEADS, WIDTH, BLOCK, RANK, BATCH = 7, 2, 2, 8, 6, 2, 3
SHAPES = {
    "token_embedding": (VOCABULARY, WIDTH),
    "position_embedding": (BLOCK, WIDTH),
    "final_norm": (WIDTH,),
    "attention_norm": (LAYERS, WIDTH),
    "attention_in": (LAYERS, WIDTH, 3 * WIDTH),
    "attention_out": (LAYERS, WIDTH, WIDTH),
    "mlp_norm": (LAYERS, WIDTH),
    "mlp_in": (LAYERS, WIDTH, 4 * WIDTH),
    "mlp_out": (LAYERS, 4 * WIDTH, WIDTH),
}


def random_parameters(seed, dtype=np.float64, scale=0.5):
    """Parameters large enough that attention is far from uniform and no gain is one."""
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_normal(shape) + name.endswith("norm")).astype(dtype)
        for name, shape in SHAPES.items()
    }


def random_tokens(seed, shape=(BATCH, BLOCK)):
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape)


def random_stream(seed, length=BLOCK, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal((BATCH, length, WIDTH)).astype(dtype)


def numpy_embed(parameters, tokens):
    """Sum of two table entries, (B, T, d)."""
    x = np.zeros((*tokens.shape, WIDTH))
    for b, t in np.ndindex(*tokens.shape):
        x[b, t] = parameters["token_embedding"][tokens[b, t]] + parameters["position_embedding"][t]
    return x


def numpy_norm(row, gain):
    """LayerNorm without bias of one vector."""
    centred = row - row.mean()
    return gain * centred / np.sqrt((centred**2).mean() + 1e-5)


def numpy_softmax(logits):
    unnormalised = np.exp(logits - logits.max())
    return unnormalised / unnormalised.sum()


def numpy_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def numpy_attention_logits(rows, attention_in, head, heads):
    """Logits q_t . k_s / sqrt(r) of one head, (T, T), from the rows that a layer sees."""
    rank = WIDTH // heads
    columns = np.arange(head * rank, (head + 1) * rank)
    logits = np.zeros((len(rows), len(rows)))
    for t, s in np.ndindex(*logits.shape):
        query = rows[t] @ attention_in[:, columns]
        key = rows[s] @ attention_in[:, WIDTH + columns]
        logits[t, s] = query @ key / np.sqrt(rank)
    return logits


def numpy_attention(rows, attention_in, heads):
    """What every position gathers from itself and its past, heads side by side, (T, d)."""
    rank = WIDTH // heads
    gathered = np.zeros((len(rows), WIDTH))
    for head in range(heads):
        columns = np.arange(head * rank, (head + 1) * rank)
        logits = numpy_attention_logits(rows, attention_in, head, heads)
        for t in range(len(rows)):
            weights = numpy_softmax(logits[t, : t + 1])
            for s, weight in enumerate(weights):
                gathered[t, columns] += weight * (rows[s] @ attention_in[:, 2 * WIDTH + columns])
    return gathered


def numpy_logits(parameters, x, heads=HEADS):
    """The whole network in loops over sequences, layers, heads and positions, (B, T, V)."""
    p = parameters
    results = []
    for sequence in x:
        stream = sequence.astype(np.float64)
        for layer in range(len(p["attention_in"])):
            rows = np.array([numpy_norm(row, p["attention_norm"][layer]) for row in stream])
            gathered = numpy_attention(rows, p["attention_in"][layer], heads)
            stream = stream + gathered @ p["attention_out"][layer]
            for t, row in enumerate(stream):
                hidden = numpy_gelu(numpy_norm(row, p["mlp_norm"][layer]) @ p["mlp_in"][layer])
                stream[t] = row + hidden @ p["mlp_out"][layer]
        final = [numpy_norm(row, p["final_norm"]) for row in stream]
        results.append(np.array(final) @ p["token_embedding"].T)
    return np.array(results)
