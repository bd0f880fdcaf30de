"""What a run came to, to the last bit: all but times of day and durations."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.robustness.killing.whole import read_arrays


def outcome_of_fit(run: Path) -> dict[str, Any]:
    """All numbers of a fit but its speed, and the names of all its files."""
    import orbax.checkpoint as ocp

    found: dict[str, Any] = {}
    for folder in sorted((run / "checkpoints").iterdir()):
        for step in folder.iterdir():
            with ocp.StandardCheckpointer() as checkpointer:
                arrays = checkpointer.restore((step / "arrays").absolute())
            for name, leaf in arrays.items():
                found[f"{folder.name} {step.name} {name}"] = _bits(leaf)
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, rows):
        row.pop("tokens_per_s")
        found[f"metrics of step {row['step']}"] = row
    found["metrics"] = [json.loads(row)["step"] for row in rows]
    found["summary"] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    found["files"] = [name for name in _names(run) if not name.startswith("checkpoints/")]
    return found


def outcome_of_sample(run: Path) -> dict[str, Any]:
    """All draws and statistics but the seconds, the last state, and the names of files."""
    found: dict[str, Any] = {}
    segments = [read_arrays(path) for path in sorted((run / "segments").glob("[0-9]*.npz"))]
    for key in segments[0]:
        if key.startswith(("draws/", "statistics/")) and not key.endswith("/seconds"):
            found[key] = _bits(np.concatenate([segment[key] for segment in segments], axis=1))
        elif key != "first" and not key.endswith("/seconds"):  # a kill moves where segments begin
            found[key] = _bits(segments[-1][key])
    names = _names(run)
    found["files"] = [name for name in names if not name.startswith("segments/")]
    found["left over"] = [name for name in names if "/." in name]
    return found


def outcome_of_files(run: Path) -> dict[str, Any]:
    """Every file, to the last byte."""
    return {name: _bits(np.fromfile(run / name, np.uint8)) for name in _names(run)}


def _names(run: Path) -> list[str]:
    return sorted(
        path.relative_to(run).as_posix()
        for path in run.rglob("*")
        if path.is_file() and path.name != "lock"
    )


def _bits(leaf: Any) -> str:
    array = np.ascontiguousarray(leaf)
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return f"{array.dtype} {array.shape} {digest}"
