"""One run: trained, measured on both halves of the text to evaluate on, and kept as a JSON file."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from arena_plan import Methods, Run, Scale, Setting, rate_runs, seed_runs, tuning_runs
from arena_training import train

from probattn import certificate, log_det, stability_margin
from probattn.inference.evaluation.perturbations import Gaussian
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.fitting.train_state import training_keys
from probattn.inference.runs.files import read_json, write_text
from probattn.models.decoder.attention import attention_layer
from probattn.models.decoder.rounding import round_weights
from probattn.stages.block_spectrum import block_spectrum
from probattn.text.corpora import Corpus, DataConfig, load_corpus
from probattn.text.tokens import corpus_tokens, corpus_vocabulary
from probattn.text.vocabulary import Vocabulary

HALVES = ("tune", "test")
NOISE = (0.5, 1.0)  # of the embeddings' root mean square
_SEED = 0  # of the noise: the same draws for every run
_AT = (0.5, 0.05, 0.95)  # the quantiles that are kept
_LATER = 2  # positions that have no margin of their own


@dataclass(frozen=True)
class Job:
    """All runs of one method, which share a process and its compiled programs.

    Attributes:
        method: name of the method.
        settings: its settings.
        scale: size of the runs.
        data: the texts.
        folder: where the files of the runs are.
    """

    method: str
    settings: Sequence[Setting]
    scale: Scale
    data: DataConfig
    folder: Path

    def runs(self) -> Iterator[Run]:
        """Yield the runs one by one: which are the later ones is known when the first are done."""
        methods = {self.method: list(self.settings)}
        yield from tuning_runs(methods, self.scale)
        tuned = tuned_settings(methods, self.scale, self.folder)
        yield from seed_runs(methods, tuned, self.scale)
        yield from rate_runs(methods, tuned, self.scale)


@dataclass(frozen=True)
class Texts:
    """What is fitted and what is evaluated on.

    Attributes:
        vocabulary: symbols.
        train: tokens that are fitted.
        halves: tokens of the two halves of the text to evaluate on, by name.
    """

    vocabulary: Vocabulary
    train: np.ndarray
    halves: dict[str, np.ndarray]


def is_done(job: Job) -> bool:
    """Tell whether all runs of a job are done."""
    return all(result(run, job.folder) is not None for run in job.runs())


def work(job: Job) -> None:
    """Make every run of a job that is not done yet, with a line for each."""
    texts = read_texts(load_corpus(job.data), job.data)
    for run in job.runs():
        if result(run, job.folder) is None:
            started = time.monotonic()
            found = measured(run, job.scale, texts)
            write_text(job.folder / run.path, json.dumps(found))
            said = "diverged" if found["diverged"] else f"{found['bpc']['test']:.3f} bits"
            seconds = time.monotonic() - started
            print(f"{run.path.with_suffix('')}: {said}, {seconds:.0f} s", flush=True)


def result(run: Run, folder: Path) -> dict[str, Any] | None:
    """Return what was measured of a run, None if less than what it asks for was.

    Raises:
        RunError: if its file is damaged.
    """
    path = folder / run.path
    if not path.exists():
        return None
    found = read_json(path)
    return None if run.whole and "noise" not in found else found


def tuned_settings(methods: Methods, scale: Scale, folder: Path) -> dict[str, Setting]:
    """Choose the setting of each method that is best on the half that settings are tuned on.

    Best is the least mean of clean BPC and BPC at half an RMS, with the first seed.
    """
    best_of = {}
    for run in tuning_runs(methods, scale):
        found = result(run, folder)
        if found is None or found["diverged"]:
            continue
        score = (found["bpc"]["tune"] + found["noise"]["tune"]["0.5"]) / 2
        best = best_of.get(run.setting.method)
        if best is None or score < best[0]:
            best_of[run.setting.method] = score, run.setting
    return {method: setting for method, (_, setting) in best_of.items()}


def read_texts(corpus: Corpus, data: DataConfig) -> Texts:
    """Cut both texts into tokens, and the one to evaluate on into two halves."""
    vocabulary = corpus_vocabulary(corpus, data.tokenizer)
    fitted, evaluated = corpus_tokens(corpus, vocabulary)
    middle = len(evaluated) // 2
    halves = zip(HALVES, (evaluated[:middle], evaluated[middle:]), strict=True)
    return Texts(vocabulary, np.asarray(fitted), dict(halves))


def measured(run: Run, scale: Scale, texts: Texts) -> dict[str, Any]:
    """Train a run and measure it.

    A network that is not finite any more is said to have diverged, and nothing else is measured of
    it but how well it did before the first step.
    """
    setting, vocabulary = run.setting, texts.vocabulary
    arguments = (np.uint32(run.seed), np.float32(run.rate), np.float32(run.clip))
    trained = train(
        *arguments,
        type(setting.strengths)(*map(np.float32, setting.strengths)),
        jnp.asarray(texts.train),
        contender=setting.contender,
        fit=scale.fit,
        vocabulary_size=vocabulary.size,
    )
    start = _start(run.seed, setting, vocabulary.size)
    network, tree = setting.contender.network(trained.sites)
    _, first = setting.contender.network(start)
    losses = np.asarray(trained.losses)
    finite = bool(np.isfinite(losses).all()) and _is_finite(tree)
    scorers = {
        half: Scorer(network, vocabulary, tokens, most_tokens=scale.study.tokens)
        for half, tokens in texts.halves.items()
    }
    found: dict[str, Any] = {
        "diverged": not finite,
        "rejected": int(trained.rejected),
        "initial_bpc": scorers["test"].score(first).bpc,
        "losses": [float(f"{loss:.4g}") if math.isfinite(loss) else None for loss in losses],
        "bpc": {h: s.score(tree).bpc if finite else None for h, s in scorers.items()},
    }
    if run.whole:
        found["noise"] = {h: _noisy(s, tree, finite) for h, s in scorers.items()}
        rounded = dict(round_weights(tree, scale.study.bits))
        found["rounded_bpc"] = scorers["test"].score(rounded).bpc if finite else None
        found["rms"] = scorers["test"].embedding_rms(tree)
        inputs, windows = scorers["test"].inputs, scale.study.windows
        found["geometry"] = geometry(network, tree, inputs, windows) if finite else {}
    return found


def geometry(network: Any, tree: Any, inputs: np.ndarray, windows: int) -> dict[str, list[float]]:
    """Measure the first layer on held-out text: margins, certificates, and the real block.

    Returns:
        Median, and quantiles 0.05 and 0.95, over tokens: of the margin, log det and certificate of
        each head, of the worst of them, and of the block's extreme singular values. A log det is
        -inf where the determinant is not positive.
    """
    rows = np.unique(np.linspace(0, len(inputs) - 1, windows).round().astype(int))
    values = _geometry(tree, inputs[rows], network=network)
    by_head = ("margin", "log_det", "certificate")
    named = {
        f"{name}_head_{head + 1}": np.asarray(values[name])[:, head]
        for name in by_head
        if name in values
        for head in range(network.config.heads)
    }
    named["margin_worst"] = np.asarray(values["margin"]).min(axis=1)
    if "certificate" in values:
        named["certificate_worst"] = np.asarray(values["certificate"]).max(axis=1)
    named |= {name: np.asarray(part) for name, part in values.items() if name not in by_head}
    return {
        name: [float(q) for q in np.quantile(part[:, _LATER:], _AT, method="lower")]
        for name, part in named.items()
    }


@partial(jax.jit, static_argnames="network")
def _geometry(tree: Any, inputs: np.ndarray, *, network: Any) -> dict[str, jax.Array]:
    layer = attention_layer(tree["layers"]["0"], network.config, 0)
    x = network.embed(tree, inputs)
    stage = layer.stage(x)
    sign, log_abs = log_det(stage)
    found = {
        "margin": stability_margin(stage),
        "log_det": jnp.where(sign > 0, log_abs, -jnp.inf),
    }
    if layer.query_norm is None:  # of heads that normalise their queries nothing is proved
        found["certificate"] = certificate(stage)
    block = block_spectrum(x, layer)
    return found | {"block_smallest": block.smallest, "block_largest": block.largest}


def _start(seed: int, setting: Setting, vocabulary_size: int) -> dict[str, jax.Array]:
    key = training_keys(np.uint32(seed)).start
    return setting.contender.start(key, vocabulary_size, setting.strengths.strength)


def _noisy(scorer: Scorer, tree: Any, finite: bool) -> dict[str, float | None]:
    rms, key = scorer.embedding_rms(tree), jax.random.key(_SEED)
    return {
        f"{level:g}": scorer.score(tree, Gaussian(level * rms), rng_key=key).bpc if finite else None
        for level in NOISE
    }


def _is_finite(tree: Any) -> bool:
    return all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(tree))
