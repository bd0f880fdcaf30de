"""Full posteriors by any sampler of the configuration, in segments that are saved as they come.

Chains start from draws of the prior, or from given values. Each goes its own way in threads, or all
go in one vectorised call. A chain is a function of the seed alone: where it is cut into segments
changes no digit, so an interrupted run that is resumed ends as one that was not.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probattn.blocks.promotion import default_promotion
from probattn.inference.config_sampling import SampleConfig
from probattn.inference.runs.segments import Segment, SegmentError, SegmentFolder
from probattn.inference.runtime.cores import other_rounding
from probattn.inference.runtime.memory import check_memory
from probattn.inference.runtime.one_thread import one_thread_at_a_time
from probattn.inference.runtime.progress import Bar, progress_bar
from probattn.inference.runtime.signals import Interrupted, deferred_interrupts
from probattn.inference.sampling.chains import Chains
from probattn.inference.sampling.initialisation import floating_values, given_values
from probattn.inference.sampling.result import PosteriorResult
from probattn.inference.sampling.subsampling import of_all_rows

SAVE_SECONDS = 30.0  # between two segments


@default_promotion()
@one_thread_at_a_time
def sample(
    model: Callable,
    *,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    config: SampleConfig | None = None,
    init_values: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    start: Mapping[str, Any] | None = None,
) -> PosteriorResult:
    """Sample the posterior of any NumPyro model, by NUTS or another method of the configuration.

    Args:
        model: a NumPyro model whose latent variables are all continuous.
        model_args: its arguments.
        model_kwargs: its keyword arguments.
        config: method, chains, iterations, seed; the defaults (NUTS) if not given.
        init_values: values of sample sites that every chain starts from, such as a MAP; the sites
            that it does not name start from a draw of the prior.
        out: folder for the segments, new or empty unless `resume` is set; without one, nothing is
            saved.
        resume: go on from the segments in `out`. Model, arguments and configuration must be those
            of the run; draws may be raised.
        progress: show a progress bar.
        start: the old name of `init_values`, which works for one more version.

    Returns:
        The draws of all chains.

    Raises:
        ValueError: if `init_values` names a site that the model lacks or holds something else than
            numbers, `out` holds segments already, or they are damaged or of another model
            (SegmentError).
        SampleError: if a chain finds no start of positive density with a finite gradient.
        Interrupted: on SIGINT, SIGTERM or SIGHUP, after the draws so far were saved.
    """
    init_values = given_values(init_values, start)
    config = SampleConfig() if config is None else config
    folder = None if out is None else SegmentFolder(out)
    if resume and folder is None:
        raise ValueError("resume without out: name the folder that holds the segments")
    if folder is not None and not resume and folder.ranges():
        raise ValueError(
            f"{folder.path}: holds segments already; go on with resume, or name another folder"
        )
    with jax.enable_x64(config.precision == "float64"):
        arguments = jax.tree.map(
            partial(_in_precision, dtype=jnp.dtype(config.precision)),
            (tuple(model_args), dict(model_kwargs or {})),
        )
        init_values = floating_values(init_values or {}, config.precision)
        if config.method == "ensemble" and not init_values:
            raise ValueError(
                "sample.method ensemble without initial values: expected init_values with a point "
                "for each chain along the first axis, such as MAPs, or sample.method mclmc"
            )
        chains = Chains(model, arguments, config, init_values)
        sampler = _Sampler(chains, config, folder, fingerprint(config, model, arguments))
        with progress_bar(
            "sample",
            total=config.warmup + config.draws,
            initial=sampler.iteration,
            unit="iteration",
            visible=progress,
        ) as bar:
            if sampler.rounding and sampler.iteration < config.warmup + config.draws:
                bar.line(f"{out}: {sampler.rounding}")
            sampler.go(bar)
    return PosteriorResult(
        method=config.method,
        draws=sampler.kept.draws,
        model=of_all_rows(model) if config.is_stochastic else model,
        model_args=arguments[0],
        model_kwargs=arguments[1],
        statistics=sampler.kept.statistics,
        seconds=sampler.seconds,
        config=config,
    )


def load_draws(
    folder: SegmentFolder, config: SampleConfig
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float, int]:
    """Return draws, statistics, seconds and iterations of saved segments.

    Raises:
        SegmentError: if a segment is damaged, missing or of another configuration.
    """
    kept, seconds, done = _Kept(config), math.nan, 0
    for segment in folder.load():
        seconds, done = kept.add_segment(folder.path, segment), segment.stop
    return kept.draws, kept.statistics, seconds, done


class _Kept:
    """Draws and statistics after the warm-up, in arrays made once."""

    def __init__(self, config: SampleConfig) -> None:
        self._config = config
        self.draws: dict[str, np.ndarray] = {}
        self.statistics: dict[str, np.ndarray] = {}

    def add(self, iteration: int, draws: Mapping, statistics: Mapping) -> None:
        """Add rows that begin at this iteration, unless they are warm-up."""
        first = iteration - self._config.warmup
        if first < 0:
            return
        for kept, new in ((self.draws, draws), (self.statistics, statistics)):
            for name, values in new.items():
                if name not in kept:
                    shape = (len(values), self._config.draws, *values.shape[2:])
                    check_memory(f"draws of {name}", math.prod(shape) * values.itemsize)
                    kept[name] = np.empty(shape, values.dtype)
                kept[name][:, first : first + values.shape[1]] = values

    def add_segment(self, path: Path, segment: Segment) -> float:
        """Add a saved segment, and return the seconds that sampling took up to its end."""
        warmup, total = self._config.warmup, self._config.warmup + self._config.draws
        if segment.first < warmup < segment.stop or segment.stop > total:
            raise SegmentError(
                f"{path}: has a segment of iterations {segment.first} to {segment.stop}, and the "
                f"configuration {warmup} of warm-up and {total} in all: expected the "
                "configuration that the segments were made with"
            )
        statistics = dict(segment.statistics)
        seconds = statistics.pop("seconds", None)
        count = segment.stop - segment.first if segment.first >= warmup else 0
        if seconds is None or any(rows.shape[1] != count for rows in segment.draws.values()):
            raise SegmentError(
                f"{path}: the segment of iterations {segment.first} to {segment.stop} is damaged: "
                f"expected {count} draws of each site; restore it from a copy"
            )
        self.add(segment.first, segment.draws, statistics)
        return float(seconds[0, -1])


class _Sampler:
    """Chains, what they have drawn so far, and where that is saved."""

    def __init__(
        self, chains: Chains, config: SampleConfig, folder: SegmentFolder | None, digest: np.ndarray
    ) -> None:
        self._chains, self._config, self._folder = chains, config, folder
        self._digest = digest
        self.kept = _Kept(config)
        self.iteration = 0
        self.seconds = 0.0
        self.rounding: str | None = None
        self._pending: list[tuple[dict, dict]] = []
        self._saved = 0
        if folder is not None:
            self._restore(folder)

    def go(self, bar: Bar) -> None:
        """Iterate to the end, saving as it goes."""
        warmup, total = self._config.warmup, self._config.warmup + self._config.draws
        started = time.perf_counter() - self.seconds
        saved = self.seconds
        with (
            deferred_interrupts() as interrupted,
            # Each part is of the warm-up or not, so that a segment is too.
            closing(self._chains.advance(self.iteration, (warmup, total))) as parts,
        ):
            for draws, statistics in parts:
                self.seconds = time.perf_counter() - started
                self._record(draws, statistics)
                self._show(bar, statistics)
                ends = self.iteration in (warmup, total)
                signum = interrupted()  # once: what it ends with is saved
                if ends or self.seconds - saved >= SAVE_SECONDS or signum:
                    self._save()
                    saved = self.seconds
                if signum and self.iteration < total:
                    raise Interrupted(signum)

    def _record(self, draws: dict, statistics: dict) -> None:
        self.kept.add(self.iteration, draws, statistics)
        if self.iteration < self._config.warmup:
            draws = {name: values[:, :0] for name, values in draws.items()}
        if self._folder is not None:
            self._pending.append((draws, statistics))
        self.iteration += statistics["n_steps"].shape[1]

    def _save(self) -> None:
        if self._folder is None or not self._pending:
            return
        draws, statistics = jax.tree.map(lambda *parts: np.concatenate(parts, 1), *self._pending)
        statistics["seconds"] = np.full(
            (self._config.chains, self.iteration - self._saved), self.seconds
        )
        self._folder.save(
            Segment(
                self._saved,
                self.iteration,
                draws,
                statistics,
                self._chains.saved(),
                self._digest,
            )
        )
        self._saved, self._pending = self.iteration, []

    def _restore(self, folder: SegmentFolder) -> None:
        expected, last = self._chains.saved(), None
        for segment in folder.load():
            _check_state(folder.path, segment, expected)
            if not np.array_equal(segment.digest, self._digest):
                raise SegmentError(
                    f"{folder.path}: the segments were made with another configuration or model, "
                    "or given other data; give the run's own, or name another folder"
                )
            self.seconds = self.kept.add_segment(folder.path, segment)
            self._saved = self.iteration = segment.stop
            self.rounding = other_rounding(segment.cores)
            last = segment.state
        if last is not None:
            self._chains.restore(last)

    def _show(self, bar: Bar, statistics: dict[str, np.ndarray]) -> None:
        bar.update(statistics["n_steps"].shape[1])
        kept = self.kept.statistics.get("diverging")
        drawn = max(self.iteration - self._config.warmup, 0)
        bar.show(
            phase="warm-up" if not drawn else "draws",
            steps=f"{statistics['n_steps'][:, -1].mean():.0f}",
            diverging="0" if kept is None else f"{int(kept[:, :drawn].sum())}",
        )


def _in_precision(leaf: Any, *, dtype: jnp.dtype) -> Any:
    """Return floating-point arrays in the precision of the run, and all else as it is."""
    if isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(leaf, dtype)
    return leaf


def fingerprint(config: SampleConfig, model: Callable, arguments: Sequence) -> np.ndarray:
    """Return the SHA-256 of all that draws depend on, except their number.

    A model counts by its name and what `functools.partial` binds to it, not by what it does.
    """
    settings = repr(replace(config, draws=1))
    if config.method == "nuts":  # as they were before there were other methods
        settings = settings[: settings.index(", method=")] + ")"
    digest = hashlib.sha256(settings.encode())
    bound = []
    while isinstance(model, partial):
        bound.append((model.args, model.keywords))
        model = model.func
    digest.update(getattr(model, "__qualname__", type(model).__qualname__).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path((arguments, bound)):
        digest.update(jax.tree_util.keystr(path).encode())
        if isinstance(leaf, jax.Array | np.ndarray):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes())
        elif not callable(leaf) and type(leaf).__repr__ is not object.__repr__:
            digest.update(repr(leaf).encode())
    return np.frombuffer(digest.digest(), np.uint8)


def _check_state(path: Path, segment: Segment, expected: Mapping[str, Any]) -> None:
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()}
    found = {name: (leaf.shape, leaf.dtype) for name, leaf in segment.state.items()}
    if shapes != found:
        names = sorted(
            name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)
        )
        raise SegmentError(
            f"{path}: the segments are of another model, precision or number of chains: they "
            f"differ in {', '.join(names[:4])}; give the run's own, or name another folder"
        )
