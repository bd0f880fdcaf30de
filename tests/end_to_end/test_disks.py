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
import json, os, subprocess, sys
disk, *command = sys.argv[1:]
os.mkdir(disk)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], check=True)
command = [sys.executable, "-m", "probattn", *command]
child = subprocess.run(command, capture_output=True, text=True)
left = [os.path.join(folder, name) for folder, _, names in os.walk(disk) for name in names]
print(json.dumps([child.returncode, child.stderr.splitlines(), left]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs mounts in a namespace of its own")
@pytest.mark.parametrize(
    ("command", "out"),
    [
        (["margins"], "out"),
        (["sensitivity", "--draws", "2"], "out"),
        (["compare"], "out"),
        (["generate", "--prompt", "the", "--length", "600"], "out.csv"),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_a_command_on_a_full_disk_ends_in_one_line_and_leaves_nothing_half_written(
    tiny_run, tmp_path, command, out
):
    disk = tmp_path / "disk"
    command = [command[0], str(tiny_run.path), *command[1:], "--out", str(disk / out)]
    child = subprocess.run(
        [*ALONE, sys.executable, "-c", FULL, str(disk), *command], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    status, lines, left = json.loads(child.stdout)
    errors = [line for line in lines if line.startswith("probattn")]
    assert (status, len(errors)) == (1, 1), lines
    assert "cannot be written: No space left on device" in errors[0]
    assert not [name for name in left if os.path.basename(name).startswith(".")]
