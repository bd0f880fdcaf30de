"""Configurations as TOML: read, written, and compared."""

import dataclasses
import os
import stat
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w

from probattn.inference.config import RunConfig
from probattn.messages import one_line

LARGEST = 2**14
"""Bytes of a file: to read a key with many dots takes the square of their number."""


def read_config(path: str | os.PathLike[str]) -> RunConfig:
    """Read a TOML file whose tables are the fields of `RunConfig`; what it leaves out is default.

    Raises:
        ValueError: see `read_tables`.
    """
    return read_tables(path, RunConfig)


def is_tuned(path: Path) -> bool:
    """Tell whether a file is the configuration of a run that began with a published model."""
    try:
        return "base" in read_toml(path)
    except ValueError:  # which `read_tables` raises again
        return False


def read_toml(path: Path) -> dict[str, Any]:
    """Read a small TOML file as it stands.

    Raises:
        ValueError: if it cannot be read, is too large or is no TOML.
    """
    try:
        if not (stat.S_ISREG(path.stat().st_mode) or path.is_dir()):
            raise ValueError("got a device or a pipe")  # it could be read for ever
        with path.open("rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        # Editors add a byte-order mark. A stream would take a part of one for an empty file.
        text = content.decode("utf-8-sig")
        return tomllib.loads(text.replace("\r\n", "\n").replace("\r", "\n"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # as above, or no UTF-8, no TOML, too deep
        raise ValueError(f"{path}: expected a TOML file: {one_line(error)}") from None


def read_tables[C](
    path: str | os.PathLike[str], kind: type[C], defaults: Mapping[str, Any] | None = None
) -> C:
    """Read a TOML file whose tables are the fields of a dataclass of dataclasses.

    Args:
        path: path of the file.
        kind: the dataclass.
        defaults: objects by table that give the fields that the file leaves out; else its class.

    Raises:
        ValueError: if the file cannot be read, is too large, is no TOML, or names an unknown or
            ill-typed field.
    """
    tables = read_toml(Path(path))
    try:
        return _from_tables(tables, kind, defaults or {})
    except ValueError as error:  # names in the file may hold line ends
        raise ValueError(f"{path}: {one_line(error)}") from None


def format_config(config: Any) -> str:
    """Write a configuration as TOML, without tables and fields that are None."""
    tables = {
        table: {name: value for name, value in fields.items() if value is not None}
        for table, fields in dataclasses.asdict(config).items()
        if fields is not None
    }
    return tomli_w.dumps(tables)


def differences(old: Any, new: Any) -> list[str]:
    """List the fields in which two configurations differ, as "table.field: old -> new"."""
    before, after = _fields(old), _fields(new)
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def _fields(config: Any) -> dict[str, Any]:
    return {
        f"{table}.{name}": value
        for table, fields in dataclasses.asdict(config).items()
        if fields is not None
        for name, value in fields.items()
    }


def _from_tables[C](tables: dict[str, Any], kind: type[C], defaults: Mapping[str, Any]) -> C:
    kinds = {name: _given(hint) for name, hint in typing.get_type_hints(kind).items()}
    _check_names(tables, kinds, "tables")
    parts = {}
    for table, values in tables.items():
        if not isinstance(values, dict):
            raise ValueError(f"{table} is {values!r}: expected a table, [{table}]")
        types_of = typing.get_type_hints(kinds[table])
        _check_names(values, types_of, f"fields of [{table}]")
        converted = {
            name: _convert(f"{table}.{name}", value, types_of[name])
            for name, value in values.items()
        }
        if table in defaults:
            parts[table] = dataclasses.replace(defaults[table], **converted)
        else:
            parts[table] = kinds[table](**converted)
    return kind(**parts)


def _check_names(given: dict[str, Any], known: dict[str, Any], what: str) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"unknown {what}: {', '.join(unknown)}; expected {', '.join(known)}")


def _convert(name: str, value: Any, kind: Any) -> Any:
    """Return a value as the declared type: only int to float is converted, and nothing guessed."""
    if type(value) is list and tuple[str, ...] in typing.get_args(kind):
        return tuple(value)  # whose members are checked where they belong
    kind = _given(kind)
    if typing.get_origin(kind) is Literal:
        kind = str
    if type(value) is int and value.bit_length() > 63:  # in base 16 it may have any length
        raise ValueError(f"{name} is an integer of {value.bit_length()} bits: expected at most 63")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}: expected {kind.__name__}")
    return value


def _given(kind: Any) -> Any:
    """Return the type of what may be None, or several, where it is neither."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    return kind
