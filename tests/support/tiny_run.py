"""One fitted run, as small as a run can be, that the tests of the top floor share.

With it an independent network in NumPy, and the matrices of every attention stage cut by hand.
"""

import os
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np

from probattn.inference import FitConfig, RunConfig, fit, load_run, post_hoc_prior
from probattn.models import LanguageModelConfig, ObjectiveConfig
from probattn.text.corpora import DataConfig

BLOCK, WIDTH, HEADS, RANK = 8, 8, 2, 2
MODEL = LanguageModelConfig(layers=1, heads=HEADS, width=WIDTH, block=BLOCK, prior_rank=RANK)
FIT = FitConfig(
    steps=200, batch=4, warmup=5, learning_rate=0.03, eval_every=100, checkpoint_every=100, seed=3
)
# Standard deviations that a fit starts from, of parameters other than gains, W_Q and W_K.
START = {
    "token_embedding": 0.05,
    "position_embedding": 0.05,
    "attention_in": WIDTH**-0.5,
    "attention_out": (2 * WIDTH) ** -0.5,
    "mlp_in": WIDTH**-0.5,
    "mlp_out": (2 * 4 * WIDTH) ** -0.5,
}
ESCAPE = "\x1b[2J"  # clears a terminal that it is printed to
WORDS = ("the token", "of a", "margin", "'and'", '"so"', "on, with", "[/i]", "\n", ESCAPE)
LABELS = ["post hoc", "trained", "layer 1 head 1", "layer 1 head 2"]


def tiny_text(characters=4000, seed=0):
    """Words in random order: newlines, quotes, commas, markup and an escape are among them."""
    rng = random.Random(seed)
    text = "".join(WORDS)
    while len(text) < characters:
        text += " " + rng.choice(WORDS)
    return text[:characters]


def tiny_config(folder, name="margin"):
    """Configuration of a run on `tiny_text`, which is written into the folder."""
    source = Path(folder) / "corpus.txt"
    source.write_text(tiny_text(), encoding="utf-8")
    return RunConfig(DataConfig(str(source)), MODEL, ObjectiveConfig(name), FIT)


def fit_tiny_run(tmp_path_factory):
    """Fit the run once for all workers of a session: the first does, the others wait for it."""
    folder = shared_folder(tmp_path_factory) / "tiny"
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            post_hoc_prior(fit(tiny_config(folder), folder / "run").run)
    return load_run(folder / "run")


def shared_folder(tmp_path_factory):
    """The temporary folder that all workers of a session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def copy_of(run, path):
    return load_run(shutil.copytree(run.path, path))


@contextmanager
def held_by_another_process(run):
    """While another process holds the lock of a run."""
    lock = str(run.path / "lock")
    code = f"import filelock as f; a = f.FileLock({lock!r}); a.acquire(); print('held'); input()"
    command = [sys.executable, "-u", "-c", code]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        yield other
    finally:
        other.communicate("\n")


def files_of(folder):
    """Content of every file below a folder, but the lock's."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def store_prior(run, **changes):
    """Put other arrays into the file in which a run keeps its post-hoc prior."""
    path = run.path / "post_hoc_prior.npz"
    with np.load(path) as stored:
        values = dict(stored)
    np.savez(path, **(values | changes))


def fold(run):
    """Give a run a post-hoc prior that is infeasible at some positions and not at others."""
    matrix = 4 * np.random.default_rng(0).normal(size=(WIDTH, RANK))
    store_prior(run, w_query=matrix, w_key=matrix)  # A is positive semidefinite: attractive


def arrays(run):
    return {name: np.asarray(value) for name, value in run.parameters.items()}


def embedded(run, tokens):
    """What enters the stack, for tokens (..., T)."""
    parameters = arrays(run)
    tables = parameters["token_embedding"], parameters["position_embedding"]
    return tables[0][tokens] + tables[1][: tokens.shape[-1]]


def stage_arguments(run, tokens):
    """By label of a stage, the arguments of the attention formulas for tokens (windows, T)."""
    parameters, x, prior = arrays(run), embedded(run, tokens), post_hoc_prior(run)
    normalised = _norm(x, parameters["attention_norm"][0])
    size = WIDTH // HEADS
    columns = np.split(parameters["attention_in"][0], 3 * HEADS, axis=1)  # queries, keys, values
    assert columns[0].shape == (WIDTH, size)
    return {
        "post hoc": (x, prior.w_query, prior.w_key),
        "trained": (x, parameters["w_query"], parameters["w_key"]),
        "layer 1 head 1": (normalised, columns[0], columns[HEADS]),
        "layer 1 head 2": (normalised, columns[1], columns[HEADS + 1]),
    }


def next_logits(run, context):
    """Logits of the token after a context of at most a block, by a network of its own."""
    return all_logits(run, context)[-1]


def all_logits(run, tokens):
    """Logits after every token of a window (T,), by a network of its own: (T, V)."""
    return logits_after(run, embedded(run, np.asarray(tokens)))


def logits_after(run, x):
    """The same of what enters the stack (T, d)."""
    p = arrays(run)
    for layer in range(MODEL.layers):
        columns = np.split(
            _norm(x, p["attention_norm"][layer]) @ p["attention_in"][layer], 3 * HEADS, axis=1
        )
        heads = [_attend(*columns[head::HEADS]) for head in range(HEADS)]
        x = x + np.concatenate(heads, axis=1) @ p["attention_out"][layer]
        hidden = _norm(x, p["mlp_norm"][layer]) @ p["mlp_in"][layer]
        gelu = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + gelu @ p["mlp_out"][layer]
    return _norm(x, p["final_norm"]) @ p["token_embedding"].T


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _attend(queries, keys, values):
    scores = queries @ keys.T / np.sqrt(queries.shape[1])
    scores[np.triu_indices(len(scores), 1)] = -np.inf
    return np.exp(log_softmax(scores)) @ values


def _norm(x, gain):
    centred = x - x.mean(axis=-1, keepdims=True)
    return gain * centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
