"""Whether the files of a run that was killed are whole."""

import hashlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def check_whole(run: Path) -> list[str]:
    """Files of a run, the temporary ones aside, that cannot be read to their end."""
    torn = []
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_dir() or name == "lock" or any(part[0] == "." for part in Path(name).parts):
            continue
        if name.startswith("checkpoints/"):
            if path.name.startswith("SHA256SUMS") and _is_newest(path.parent):
                torn += [f"{name}: {each}" for each in _changed(path)]
            continue
        try:
            READERS[path.suffix](path)
        except Exception as error:
            torn.append(f"{name}: {type(error).__name__} {error}")
    return torn


def _is_newest(checkpoint: Path) -> bool:
    """Whether it is whole by its name, and not an older one, whose removal a kill may cut short."""
    steps = [int(each.name) for each in checkpoint.parent.iterdir() if each.name.isdecimal()]
    return checkpoint.name.isdecimal() and int(checkpoint.name) == max(steps)


def _changed(sums: Path) -> list[str]:
    lines = [line.split("  ", 1) for line in sums.read_text(encoding="utf-8").splitlines()]
    return [
        name
        for digest, name in lines
        if hashlib.sha256((sums.parent / name).read_bytes()).hexdigest() != digest
    ]


def _read_lines(path: Path) -> None:
    """All but a last line without its end, which is what a kill may leave."""
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        json.loads(line)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def _read_netcdf(path: Path) -> None:
    import xarray as xr

    with xr.open_datatree(path) as tree:
        tree.load()


def _read_csv(path: Path) -> None:
    if not path.read_bytes().endswith(b"\n"):
        raise ValueError("no end")


def _read_png(path: Path) -> None:
    if not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
        raise ValueError("no end")


READERS: dict[str, Callable[[Path], Any]] = {
    ".toml": lambda path: tomllib.loads(path.read_text(encoding="utf-8")),
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".jsonl": _read_lines,
    ".npz": read_arrays,
    ".nc": _read_netcdf,
    ".csv": _read_csv,
    ".png": _read_png,
}
