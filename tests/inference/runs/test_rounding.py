"""Going on with another number of cores, which rounds otherwise, is told in one line."""

import os

import pytest

from probattn.inference import fit, load_run
from probattn.inference.runtime import cores


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert cores.cores() == 3
    assert cores.other_rounding(3) is None
    assert cores.other_rounding(None) is None
    assert cores.other_rounding(2).startswith("computed so far on 2 cores, and goes on with 3")
    monkeypatch.setattr(cores.jax, "default_backend", lambda: "gpu")
    assert cores.other_rounding(2) is None


@pytest.mark.slow
def test_a_fit_that_goes_on_with_other_cores_says_so(own_run, monkeypatch, capsys):
    path = own_run.path / "config.toml"
    path.write_text(path.read_text("utf-8").replace("\nsteps = 200\n", "\nsteps = 300\n"), "utf-8")
    longer = load_run(own_run.path)
    assert longer.config.fit.steps == 300
    monkeypatch.setattr(cores, "cores", lambda: 64)
    fit(longer.config, own_run.path, resume=True, progress=True)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "cores" in line]
    assert line.startswith(f"{own_run.path}: computed so far on ")
    assert line.partition(": ")[2].partition(":")[0].endswith("cores, and goes on with 64")
    fit(longer.config, own_run.path, resume=True, progress=True)
    assert "cores" not in capsys.readouterr().err  # nothing was left to do
