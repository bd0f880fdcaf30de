"""A child process with four devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

FOUR = "--xla_force_host_platform_device_count=4"


def in_child(code, **environment):
    """What a child process prints last, as JSON."""
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": FOUR, "JAX_PLATFORMS": "cpu", **environment},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])
