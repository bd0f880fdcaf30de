"""Fuzz the readers and the array functions with hostile input.

    python -m tests.robustness.fuzz [--inputs 100000] [--only configuration run ...]

Each input must end in a right answer, by an oracle of the target's own, or in a documented error of
one line. A fiftieth of the inputs is drawn by Hypothesis, the rest by atheris (libFuzzer) from the
same strategies, guided by the coverage of probattn; a crash or an input of half a minute ends the
process and is a finding, as is whatever else is raised. Without atheris (`pip install atheris`)
Hypothesis draws all. Targets are in `fuzzing/`. Results go to `benchmarks/results/fuzz.json`,
where those of other targets stay.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness import environment
from tests.support.project import ROOT

NAMES = (
    "command_line",
    "configuration",
    "vocabulary",
    "corpus",
    "run",
    "metrics",
    "pretrained",
    "shapes",
    "values",
)
MEMORY_DISK = Path("/dev/shm")  # where there is one, files cost little
CRASHES = 5  # after which a target is given up


def fuzz(name: str, inputs: int, *, seed: int, findings: Path) -> dict[str, Any]:
    """Counts of one target, of both generators together."""
    guided = importlib.util.find_spec("atheris") is not None
    shares = {"hypothesis": inputs // 50, "atheris": inputs - inputs // 50}
    if not guided:
        shares = {"hypothesis": inputs}
    total: dict[str, Any] = {"inputs": 0, "outcomes": {}, "findings": {}, "seconds": 0.0}
    with tqdm(total=inputs, desc=name, unit="input") as bar:
        for by, share in shares.items():
            done = crashes = 0
            while done < share and crashes < CRASHES:
                crashed, report = _run(name, by, share - done, seed + crashes, findings, bar)
                done += report["inputs"]
                for kind in ("outcomes", "findings"):
                    for each, count in report[kind].items():
                        total[kind][each] = total[kind].get(each, 0) + count
                total["seconds"] = round(total["seconds"] + report["seconds"], 1)
                if crashed:
                    crashes += 1
                    total["findings"][crashed] = total["findings"].get(crashed, 0) + 1
                elif report["inputs"] == 0 or by == "hypothesis":
                    break
            total["inputs"] += done
            total[by] = done
    return total


def _run(
    name: str, by: str, inputs: int, seed: int, findings: Path, bar: tqdm
) -> tuple[str, dict[str, Any]]:
    """One process: how it crashed, empty if it did not, and its last report."""
    root = MEMORY_DISK if MEMORY_DISK.is_dir() else None
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        report = {"inputs": 0, "outcomes": {}, "findings": {}, "seconds": 0.0}
        path = Path(scratch) / "work" / "report.json"
        log = findings / f"{name}-{by}.log"
        findings.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "tests.robustness.fuzzing.process", name, "--by", by),
            *("--inputs", str(inputs), "--seed", str(seed), "--findings", str(findings)),
            *("--scratch", str(path.parent)),
        ]
        with log.open("wb") as stream:
            process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
        while True:
            status = process.poll()
            before = report["inputs"]
            if path.exists():
                report = json.loads(path.read_text(encoding="utf-8"))
            bar.update(report["inputs"] - before)
            if status is not None:
                break
            time.sleep(0.5)
        return (f"{by} ended with status {status}, see {log.name}" if status else ""), report


def main() -> None:
    parser = argparse.ArgumentParser(description="hostile input")
    parser.add_argument("--inputs", type=int, default=100_000, help="of every target")
    parser.add_argument("--only", nargs="+", action="extend", choices=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("findings"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fuzz.json")
    options = parser.parse_args()
    results: dict[str, Any] = {"targets": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))
    for name in options.only or NAMES:
        found = fuzz(name, options.inputs, seed=options.seed, findings=options.findings)
        results["environment"] = environment()
        results["targets"][name] = {"seed": options.seed, **found}
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"{'target':15} {'inputs':>8} {'findings':>8} {'seconds':>8}  outcomes")
    for name, found in results["targets"].items():
        outcomes = ", ".join(f"{each} {count}" for each, count in found["outcomes"].items())
        counts = f"{found['inputs']:8} {sum(found['findings'].values()):8} {found['seconds']:8.0f}"
        print(f"{name:15} {counts}  {outcomes}")
    print("wrote", options.out)


if __name__ == "__main__":
    main()
