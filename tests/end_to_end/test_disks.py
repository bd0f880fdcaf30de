"""Disks that are really full, or read-only: small ones, mounted in a namespace of their own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from probattn.inference import fit, load_run
from probattn.inference.config_files import format_config
from tests.support.mounts import ALONE, may_mount
from tests.support.tiny_posterior import LATENT_FLAGS
from tests.support.tiny_run import tiny_config

STORY = """
import json, os, shutil, subprocess, sys
folder, free = sys.argv[1], int(sys.argv[2])
disk = folder + "/disk"


def remount(options):
    subprocess.run(["mount", "-o", "remount," + options, disk], check=True)


def probattn(*arguments):
    command = [sys.executable, "-m", "probattn.inference.cli", "fit", "--out", disk + "/run"]
    child = subprocess.run([*command, *arguments], capture_output=True, text=True)
    return child.returncode, child.stderr.splitlines()


os.mkdir(disk)
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={free}k", "tmpfs", disk], check=True)
told = [probattn("--config", folder + "/config.toml")]
remount("ro")
told.append(probattn("--resume"))
remount("rw,size=64m")
told.append(probattn("--resume"))
shutil.copytree(disk + "/run", folder + "/kept")
print(json.dumps(told))
"""


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs mounts in a namespace of its own")
def test_a_full_disk_and_a_read_only_one_lose_nothing(tmp_path):
    config = tiny_config(tmp_path)
    (tmp_path / "config.toml").write_text(format_config(config), encoding="utf-8")
    child = subprocess.run(
        [*ALONE, sys.executable, "-c", STORY, str(tmp_path), "100"],
        env={**os.environ, "JAX_ENABLE_X64": "1"},  # as the tests' own process has it
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    full, read_only, resumed = json.loads(child.stdout)
    for (status, lines), expected, reason in (
        (full, 1, "No space left on device"),
        (read_only, 2, "Read-only file system"),
    ):
        assert status == expected
        errors = [line for line in lines if not line.startswith("step ")]
        assert len(errors) == 1, errors
        assert f"cannot be written: {reason}; what was saved before is as it was" in errors[0]
    assert resumed[0] == 0
    kept, whole = load_run(tmp_path / "kept"), fit(config, tmp_path / "whole").run
    assert kept.step == whole.step
    for name, value in whole.parameters.items():
        np.testing.assert_array_equal(kept.parameters[name], value)


FULL = """
import hashlib, json, os, shutil, subprocess, sys
disk, run, *command = sys.argv[1:]
os.mkdir(disk)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
if run:
    shutil.copytree(run, disk + "/run")


def files():
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(disk) for name in names]
    return {path: hashlib.sha256(open(path, "rb").read()).hexdigest() for path in paths}


before = files()
used = shutil.disk_usage(disk).used // 4096
subprocess.run(["mount", "-o", f"remount,size={4 * (used + 2)}k", disk], check=True)
command = [sys.executable, "-m", "probattn", *command]
child = subprocess.run(command, capture_output=True, text=True)
after = files()
for path in [path for path in before if after.get(path) != before[path]]:
    json.load(open(path))  # a summary, which is whole
print(json.dumps([child.returncode, child.stderr.splitlines(), list(after)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs mounts in a namespace of its own")
@pytest.mark.parametrize(
    "command",
    [
        ["margins", "RUN", "--out", "DISK/out"],
        pytest.param(
            ["sensitivity", "RUN", "--draws", "2", "--out", "DISK/out"], marks=pytest.mark.nightly
        ),
        pytest.param(["compare", "RUN", "--out", "DISK/out"], marks=pytest.mark.nightly),
        ["generate", "RUN", "--prompt", "the", "--length", "600", "--out", "DISK/out.csv"],
        ["evaluate", "DISK/run"],
        ["sample", "--data", "TEXT", *LATENT_FLAGS, "--out", "DISK/out"],
        pytest.param(["demo", "--out", "DISK/out"], marks=pytest.mark.nightly),
        pytest.param(["figures", "--out", "DISK/out"], marks=pytest.mark.nightly),
    ],
    ids=lambda command: command[0],
)
def test_a_command_on_a_full_disk_ends_in_one_line_and_leaves_nothing_half_written(
    tiny_run, tmp_path, command
):
    disk = tmp_path / "disk"
    given = {"RUN": tiny_run.path, "TEXT": tiny_run.config.data.source, "DISK": disk}
    for name, path in given.items():
        command = [part.replace(name, str(path)) for part in command]
    run = str(tiny_run.path) if str(disk / "run") in command else ""
    child = subprocess.run(
        [*ALONE, sys.executable, "-c", FULL, str(disk), run, *command],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    status, lines, left = json.loads(child.stdout)
    errors = [line for line in lines if line.startswith("probattn")]
    assert (status, len(errors)) == (1, 1), lines
    assert "cannot be written: No space left on device" in errors[0]
    assert not [name for name in left if os.path.basename(name).startswith(".")]
