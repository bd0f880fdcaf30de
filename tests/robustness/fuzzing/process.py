"""One target in a process of its own, which writes what it has found into its folder as it goes.

    python -m tests.robustness.fuzzing.process TARGET --by hypothesis|atheris --inputs N --seed S \
        --scratch DIR --findings DIR

Both draw from the same strategy: Hypothesis by its own generator, and atheris (libFuzzer) by
bytes that it mutates to reach code that was not reached before.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

_SECONDS = 30  # an input that takes longer is a finding
_MEBIBYTES = 4096
_STARTS = 64  # random inputs that atheris starts from
_BYTES = 2048  # of each
_EVERY = 500  # inputs between two reports
_INSTRUMENTED = ["probattn", "tomllib"]


class Finished(BaseException):
    """All inputs are done."""


class Recorder:
    """Runs the inputs of a target; counts outcomes and keeps one input of every finding."""

    def __init__(self, options: argparse.Namespace, check: Any) -> None:
        self._options, self._check = options, check
        self._started = time.perf_counter()
        self.outcomes: Counter[str] = Counter()
        self.findings: Counter[str] = Counter()

    def __call__(self, value: Any) -> None:
        """Run one input; what it raises is recorded, and the fuzzing goes on."""
        try:
            self.outcomes[self._check(value)] += 1
        except Exception as error:
            self._record(value, error)
        done = self.outcomes.total()
        if done % _EVERY == 0 or done == self._options.inputs:
            self.report()
        if done == self._options.inputs:
            raise Finished

    def report(self) -> None:
        """Write the counts, whole."""
        report = {
            "inputs": self.outcomes.total(),
            "outcomes": dict(self.outcomes.most_common()),
            "findings": dict(self.findings),
            "seconds": round(time.perf_counter() - self._started, 1),
        }
        path = self._options.scratch / "report.json"
        path.with_suffix(".new").write_text(json.dumps(report), encoding="utf-8")
        path.with_suffix(".new").replace(path)

    def _record(self, value: Any, error: Exception) -> None:
        """Findings are told apart by their class and the line of ours that raised them."""
        frames = traceback.extract_tb(error.__traceback__)
        ours = [each for each in frames if "/fuzzing/target.py" not in each.filename]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        name = f"{type(error).__name__} at {place}"
        self.outcomes["finding"] += 1
        self.findings[name] += 1
        if self.findings[name] == 1:
            self._options.findings.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256(name.encode()).hexdigest()[:8]
            path = self._options.findings / f"{self._options.target}-{digest}.txt"
            text = "".join(traceback.format_exception(error))
            path.write_text(f"{value!r}\n\n{text}", encoding="utf-8", errors="backslashreplace")


def main() -> None:
    parser = argparse.ArgumentParser(description="one target of benchmarks/fuzz.py")
    parser.add_argument("target")
    parser.add_argument("--by", choices=("hypothesis", "atheris"), required=True)
    parser.add_argument("--inputs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--findings", type=Path, required=True)
    options = parser.parse_args()

    instrumented: Any = contextlib.nullcontext()
    if options.by == "atheris":
        import atheris

        instrumented = atheris.instrument_imports(include=_INSTRUMENTED)
    with instrumented:
        from tests.robustness.fuzzing.targets import TARGETS
    import hypothesis

    files = options.scratch / "files"
    files.mkdir(parents=True)
    target = TARGETS[options.target](files)
    recorder = Recorder(options, target.check)

    @hypothesis.seed(options.seed)
    @hypothesis.settings(
        max_examples=options.inputs,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(target.inputs)
    def fuzzed(value: Any) -> None:
        recorder(value)

    if options.by == "hypothesis":
        with contextlib.suppress(Finished):
            fuzzed()
        recorder.report()
        return

    starts = options.scratch / "starts"
    starts.mkdir()
    rng = random.Random(options.seed)
    for number in range(_STARTS):
        (starts / f"{number:03d}").write_bytes(rng.randbytes(_BYTES))
    run_one = fuzzed.hypothesis.fuzz_one_input

    def one(data: bytes) -> None:
        try:
            run_one(data)
        except Finished:
            sys.stdout.flush()
            os._exit(0)  # libFuzzer has no other way to end after so many inputs

    flags = [
        *(f"-seed={options.seed + 1}", f"-max_len={2 * _BYTES}", "-len_control=0"),
        *(f"-timeout={_SECONDS}", f"-rss_limit_mb={_MEBIBYTES}", "-verbosity=0"),
        f"-artifact_prefix={options.findings}/{options.target}-",
    ]
    atheris.Setup([sys.argv[0], *flags, str(starts)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
