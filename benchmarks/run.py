"""Run the benchmarks and write their figures.

    python benchmarks/run.py [--rounds 15] [--only nuts export_memory]

With --only, the other figures of an existing file stay; "updated" then says where, and in how many
rounds, those that were run were measured. Scaling and sequence_gain, which have figures, are in
files of their own.
"""

import argparse
import json
from pathlib import Path

import certificate
import checkpoints
import export_memory
import log_det
import margins
import nuts
import radius
import sampling
import scaling
import sequence_gain
import start
import svi_step
from harness import environment

from probattn.inference.figures.style import save_figure

# Each has a function of its name, and a report of what that returns.
BENCHMARKS = {
    module.__name__: module
    for module in (
        log_det,
        margins,
        certificate,
        radius,
        scaling,
        sequence_gain,
        svi_step,
        start,
        checkpoints,
        sampling,
        nuts,
        export_memory,
    )
}


def main() -> None:
    """Run the benchmarks that the command line names."""
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
        module = BENCHMARKS[name]
        found = getattr(module, name)(options.rounds)
        module.report(found)
        if hasattr(module, "figure"):
            written = options.out / f"{name}.json"
            save_figure(module.figure(found), written.with_suffix(".png"))
            contents = measured | found
        else:
            results[name] = found
            if update:
                results.setdefault("updated", {})[name] = measured
            written, contents = path, results
        written.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
        print("wrote", written)


if __name__ == "__main__":  # a benchmark may start processes, which read this file
    main()
