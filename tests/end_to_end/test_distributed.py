"""One fit by two processes on the loopback: ended by a signal, by a kill, and gone on with."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from probattn.inference import fit, load_run
from probattn.inference.cli import main
from probattn.inference.config_files import format_config
from tests.support.four_devices import FOUR, in_child
from tests.support.tiny_run import tiny_config

STEPS, EVERY = 240, 20
DOUBLE = {"JAX_ENABLE_X64": "1"}  # as the tests' own process has it
RESUME = """
import json, jax
from probattn.inference import fit, read_config
result = fit(read_config({run!r} + "/config.toml"), {run!r}, resume=True, mesh="fsdp=4")
print(json.dumps([jax.device_count(), result.run.step]))
"""

RAISED = """
import json
from probattn.inference.runtime.processes import ProcessError, distributed
try:
    with distributed("127.0.0.1:{port}", 1, 0):
        raise ValueError({message!r})
except (ProcessError, ValueError) as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_config(folder):
    """A fit that two processes take some seconds for, with arrays large enough to be spread."""
    config = tiny_config(folder)
    return replace(
        config,
        model=replace(config.model, width=32, prior_rank=1),
        # A rate at which rounding is not enlarged from step to step, as it is at ten times of it.
        fit=replace(
            config.fit,
            learning_rate=0.003,
            steps=STEPS,
            eval_every=120,
            checkpoint_every=EVERY,
            batch=4,
        ),
    )


class Pair:
    """Two processes of the command line that fit one run, each with this number of devices."""

    def __init__(self, folder, devices, *options):
        self.run = folder / "run"
        common = ["-m", "probattn.inference.cli", "fit", "--out", str(self.run), *options]
        address = f"127.0.0.1:{free_port()}"
        common += ["--coordinator", address, "--num-processes", "2", "--process-id"]
        flags = FOUR.replace("4", str(devices))
        self._errors = [folder / f"errors{number}" for number in (0, 1)]
        self.processes = []
        for number, path in enumerate(self._errors):
            with path.open("w") as stream:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *common, str(number)],
                        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **DOUBLE},
                        stdout=subprocess.PIPE,
                        stderr=stream,
                        text=True,
                    )
                )

    def send(self, number, signum, *, after):
        """A signal to one of them, once the run has a checkpoint later than this step."""
        stop = time.monotonic() + 240
        folder = self.run / "checkpoints" / "latest"
        while not any(int(e.name) > after for e in folder.glob("*") if e.name.isdecimal()):
            ended = [process.poll() for process in self.processes]
            assert ended == [None, None], self.errors()
            assert time.monotonic() < stop, self.errors()
            time.sleep(0.02)
        self.processes[number].send_signal(signum)

    def ends(self):
        """Exit statuses, and what each printed on standard output."""
        printed = [process.communicate(timeout=60)[0] for process in self.processes]
        return [process.returncode for process in self.processes], printed

    def errors(self):
        """Lines that say why each ended."""
        return [
            [line for line in path.read_text().splitlines() if line.startswith("probattn: ")]
            for path in self._errors
        ]


@pytest.fixture(scope="module", name="story")
def story_fixture(tmp_path_factory):
    """SIGTERM to the second of two processes; both again, and SIGKILL; then one with four."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "config.toml").write_text(format_config(two_config(folder)))
    told = {}
    pair = Pair(folder, 2, "--config", str(folder / "config.toml"), "--mesh", "data=2,fsdp=2")
    pair.send(1, signal.SIGTERM, after=0)
    told["term"] = *pair.ends(), pair.errors(), load_run(pair.run).latest.step
    # With two devices in each, one may wait for the other until JAX aborts (decision 37).
    pair = Pair(folder, 1, "--resume", "--mesh", "fsdp=2")
    pair.send(1, signal.SIGKILL, after=told["term"][-1])
    started = time.monotonic()
    told["kill"] = *pair.ends(), pair.errors(), load_run(pair.run).latest.step
    told["seconds"] = time.monotonic() - started
    told["resumed"] = in_child(RESUME.format(run=str(pair.run)), **DOUBLE)
    told["run"] = load_run(pair.run)
    return told


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_after_saving(story):
    statuses, _, errors, step = story["term"]
    assert statuses == [143, 143]
    line = "probattn: ended by SIGTERM; what was done is saved; go on with --resume"
    assert errors == [[line], [line]]
    assert 0 < step < STEPS


@pytest.mark.slow
def test_the_other_process_ends_by_one_line_when_one_is_killed(story):
    statuses, printed, errors, step = story["kill"]
    assert statuses == [1, -signal.SIGKILL]
    assert printed[0].count("\n") == printed[0].count("[Gloo]")
    ((line,), nothing) = errors
    assert re.search(r"process 0: the processes cannot go on together.*--resume", line)
    assert nothing == []
    assert story["seconds"] < 30
    assert story["term"][-1] < step < STEPS


@pytest.mark.slow
def test_the_parameters_are_those_of_one_device_without_a_kill(story, tmp_path):
    devices, step = story["resumed"]
    assert devices == 4
    assert step in (120, STEPS)
    whole = fit(two_config(tmp_path), tmp_path / "run").run
    assert [row["step"] for row in story["run"].metrics()] == [120, STEPS]
    for name, value in whole.parameters.items():
        np.testing.assert_allclose(story["run"].parameters[name], value, rtol=0, atol=1e-9)
    for got, expected in zip(story["run"].metrics(), whole.metrics(), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        # so JAX says it of a program that is lost while it is dispatched
        ("UNKNOWN: Gloo AllGather failed", "ProcessError"),
        ("fit.batch is 3", "ValueError"),
    ],
)
def test_a_collective_that_failed_is_told_from_bad_input(message, expected):
    kind, said = in_child(RAISED.format(port=free_port(), message=message))
    assert kind == expected
    assert message in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--num-processes", "2"], "without --coordinator"),
        (["--coordinator", "host"], "expected HOST:PORT"),
        (["--coordinator", "host:1"], "how many processes there are"),
        (["--coordinator", "host:1", "--num-processes", "2", "--process-id", "2"], "from 0"),
        (["--mesh", "data=2"], "mesh data=2 is of 2 devices, and there are 1"),
        (["--mesh", "rows=2"], "expected data=N, fsdp=N or both"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(tmp_path, capsys, options, expected):
    assert main(["fit", "--out", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
