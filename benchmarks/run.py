"""Run the benchmarks and write their figures.

    python benchmarks/run.py [--rounds 15] [--only nuts export_memory]

With --only, the other figures of an existing file stay; "updated" then says where, and in how many
rounds, those that were run were measured.
"""

import argparse
import json
from pathlib import Path

import export_memory
import log_det
import nuts
import sampling
import start
import svi_step
from harness import environment

# Each has a function of its name, and a report of what that returns.
BENCHMARKS = {
    module.__name__: module for module in (log_det, svi_step, start, sampling, nuts, export_memory)
}

parser = argparse.ArgumentParser(description="benchmarks of probattn")
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--only", nargs="+", action="extend", choices=BENCHMARKS)
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
options = parser.parse_args()

path = options.out / "cpu.json"
measured = {"environment": environment(), "rounds": options.rounds}
update = options.only and path.exists()
results = json.loads(path.read_text(encoding="utf-8")) if update else dict(measured)
options.out.mkdir(parents=True, exist_ok=True)
for name in options.only or BENCHMARKS:
    results[name] = getattr(BENCHMARKS[name], name)(options.rounds)
    if update:
        results.setdefault("updated", {})[name] = measured
    BENCHMARKS[name].report(results[name])
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
print("wrote", path)
