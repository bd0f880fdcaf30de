"""Run the benchmarks and write their figures: python benchmarks/run.py [--rounds 15]."""

import argparse
import json
from pathlib import Path

from harness import CONTROL, environment
from sampling import report, sampling
from svi_step import svi_step

parser = argparse.ArgumentParser(description="benchmarks of probattn")
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
options = parser.parse_args()

results = {"environment": environment(), "rounds": options.rounds, "svi_step": {}}
results["svi_step"] = svi_step(options.rounds)
for objective, table in results["svi_step"].items():
    for name, figures in table.items():
        label = "hand-written again" if name == CONTROL else name
        print(
            f"svi step, {objective:6s} {label:20s} {1e3 * figures['seconds'] / 20:7.2f} ms  "
            f"x {figures['ratio']:.3f} ({figures['ratio_low']:.3f} to {figures['ratio_high']:.3f})"
        )
results["sampling"] = sampling(options.rounds)
report(results["sampling"])
options.out.mkdir(parents=True, exist_ok=True)
path = options.out / "cpu.json"
path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
print("wrote", path)
