"""Compiled programs on disk: a second start of a command compiles nothing anew."""

import os
import shutil
import stat
import subprocess
import sys
import warnings

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from probattn.inference.config_files import format_config
from probattn.inference.runtime import compilation_cache
from probattn.inference.runtime.compilation_cache import keep_compiled_programs
from tests.support.tiny_run import tiny_config

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that was told nothing, and a user's cache that is empty."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with warnings.catch_warnings():
        yield tmp_path / "xdg" / "probattn" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)


def unexpected(line):
    raise AssertionError(line)


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
    keep_compiled_programs(unexpected)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not fresh.exists()


def test_a_cache_that_cannot_be_written_is_done_without(fresh):
    keep_compiled_programs(unexpected)
    assert jax.config.jax_compilation_cache_dir == str(fresh)
    jax.config.update("jax_compilation_cache_dir", None)
    fresh.rmdir()
    fresh.parent.rmdir()
    fresh.parent.write_text("in the way")
    keep_compiled_programs(unexpected)
    assert jax.config.jax_compilation_cache_dir is None


def test_nobody_else_can_reach_the_cache_whatever_the_umask(fresh):
    before = os.umask(0)
    try:
        keep_compiled_programs(unexpected)
    finally:
        os.umask(before)
    for folder in (fresh, fresh.parent, fresh.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_cache_that_others_can_read_becomes_private(fresh):
    fresh.mkdir(parents=True)
    fresh.chmod(0o755)
    keep_compiled_programs(unexpected)
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700


def foreign(fresh):
    os.chown(fresh, 12345, 12345)


def below_foreign(fresh):
    os.chown(fresh.parent, 12345, 12345)


def linked(fresh):
    fresh.rename(fresh.with_name("elsewhere"))
    fresh.symlink_to("elsewhere")


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives files away")


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda fresh: fresh.chmod(0o770), "others may write to"),
        (lambda fresh: fresh.chmod(0o1777), "others may write to"),
        (lambda fresh: fresh.parent.chmod(0o777), "others may write to"),
        (linked, "is a link"),
        pytest.param(foreign, "belongs to another user", marks=as_root),
        pytest.param(below_foreign, "belongs to another user", marks=as_root),
    ],
)
def test_a_cache_that_others_could_write_to_is_refused_in_a_line(fresh, spoil, line):
    fresh.mkdir(parents=True, mode=0o700)
    fresh.parent.chmod(0o700)
    spoil(fresh)
    lines = []
    keep_compiled_programs(lines.append)
    [told] = lines
    assert told.startswith("compiled programs are not kept: ")
    assert line in told
    assert jax.config.jax_compilation_cache_dir is None


def test_the_programs_that_were_not_used_for_longest_are_removed(fresh, monkeypatch):
    monkeypatch.setattr(compilation_cache, "MOST_BYTES", 25)
    fresh.mkdir(parents=True)
    for name, used in (("a-cache", 30), ("b-cache", 10), ("c-cache", 20)):
        (fresh / name).write_bytes(bytes(10))
        os.utime(fresh / name, (used, 5))
    keep_compiled_programs(unexpected)
    assert sorted(path.name for path in fresh.iterdir()) == ["a-cache", "c-cache"]


@pytest.fixture
def own_cache(fresh):
    """JAX's cache on disk in that folder, while this test runs."""
    reset_cache()
    yield fresh
    reset_cache()


def compiled_anew(number):
    jax.clear_caches()
    return jax.jit(lambda x: x * number)(1.0)


@pytest.mark.slow
def test_a_torn_program_is_compiled_and_kept_again_without_a_word(own_cache, recwarn):
    keep_compiled_programs(unexpected)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compiled_anew(3.25)
    [entry] = own_cache.glob("*lambda*-cache")
    whole = entry.stat().st_size
    entry.write_bytes(entry.read_bytes()[: whole // 2])
    assert compiled_anew(3.25) == 3.25
    assert entry.stat().st_size > whole // 2
    assert not recwarn.list


def test_a_cache_that_takes_no_programs_is_told_once(own_cache, recwarn):
    lines = []
    keep_compiled_programs(lines.append)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compiled_anew(3.5)
    shutil.rmtree(own_cache)
    own_cache.write_text("in the way")
    compiled_anew(3.75)
    compiled_anew(4.25)
    [line] = lines
    assert f"compiled programs are not kept in {own_cache}: " in line
    assert not recwarn.list
