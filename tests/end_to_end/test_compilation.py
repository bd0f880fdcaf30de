"""Compiled programs on disk: a second start of a command compiles nothing anew."""

import os
import subprocess
import sys

import jax
import pytest

from probattn.inference.config_files import format_config
from probattn.inference.runtime.compilation_cache import keep_compiled_programs
from tests.support.tiny_run import tiny_config

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that was told nothing, and a user's cache that is empty."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    yield tmp_path / "xdg" / "probattn" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)


# Keeps every program: whether one takes longer than the least time differs from start to start.
KEEP_ALL = """
import sys
from probattn.inference import cli
from probattn.inference.runtime import compilation_cache
compilation_cache.LEAST_SECONDS = 0
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_programs_are_found_by_a_process_of_another_hash_seed_and_a_fit_of_another_seed(tmp_path):
    """The order of a set of strings differs there: no program may depend on it, nor on the seed."""
    (tmp_path / "tiny.toml").write_text(format_config(tiny_config(tmp_path)), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "xdg")
    programs = []
    for number, (hash_seed, seed) in enumerate([("1", "0"), ("2", "0"), ("2", "1")]):
        options = ["--config", "tiny.toml", "--out", f"run{number}", "--fit.steps", "6"]
        options += ["--fit.seed", seed]
        subprocess.run(
            [sys.executable, "-c", KEEP_ALL, "fit", *options],
            env=environment | {"PYTHONHASHSEED": hash_seed},
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        programs.append(
            {path.name for path in (tmp_path / "xdg/probattn/compiled").glob("*-cache")}
        )
    assert any("run" in name for name in programs[0])  # the steps, which take longest to compile
    assert programs[2] == programs[1] == programs[0]
    reports = [(tmp_path / f"run{number}" / "metrics.jsonl").read_text() for number in "012"]
    # Up to the rate of steps, which is a time.
    same, other_hash, other_seed = (report.partition("tokens_per_s")[0] for report in reports)
    assert same == other_hash != other_seed


def test_where_the_user_keeps_them_stands(fresh, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not fresh.exists()


def test_a_cache_that_cannot_be_written_is_done_without(fresh):
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(fresh)
    jax.config.update("jax_compilation_cache_dir", None)
    fresh.rmdir()
    fresh.parent.rmdir()
    fresh.parent.write_text("in the way")
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None
