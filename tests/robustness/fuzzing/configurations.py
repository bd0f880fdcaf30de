"""Target: the configuration reader, for fits and for sampled posteriors."""

import dataclasses
import tomllib
import typing
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import strategies as st

from probattn.inference.config import RunConfig
from probattn.inference.config_files import differences, format_config, read_tables
from probattn.inference.config_sampling import SampleRunConfig
from probattn.models import LatentEmbeddingsConfig
from tests.robustness.fuzzing.material import edited, edits, floats, integers, plain_text, same
from tests.robustness.fuzzing.target import Target, refused, require

_TABLES: dict[str, dict[str, Any]] = {}
for _config in (RunConfig(), SampleRunConfig(latent=LatentEmbeddingsConfig())):
    for _part in dataclasses.fields(_config):
        if (_value := getattr(_config, _part.name)) is not None:
            _TABLES[_part.name] = {
                name: typing.get_type_hints(type(_value))[name] for name in vars(_value)
            }


def _values(hint: Any) -> st.SearchStrategy[Any]:
    """Mostly what a field of this type may be, and anything else."""
    choices = [word for word in _words(hint) if isinstance(word, str)]
    own = {"int": integers, "float": floats, "bool": st.booleans(), "str": plain_text}
    likely = [strategy for kind, strategy in own.items() if kind in str(hint)]
    if choices:
        likely.append(st.sampled_from(choices))
    anything = st.one_of(integers, floats, st.booleans(), plain_text, st.lists(st.integers()))
    return st.one_of(*likely, *likely, anything)


def _words(hint: Any) -> list[Any]:
    nested = [word for part in typing.get_args(hint) for word in _words(part)]
    return nested or [hint]


_tables = st.fixed_dictionaries(
    {},
    optional={
        table: st.one_of(
            st.fixed_dictionaries(
                {}, optional={name: _values(hint) for name, hint in fields.items()}
            ),
            st.dictionaries(plain_text, integers, max_size=2),
        )
        for table, fields in _TABLES.items()
    },
)
# A number that is written in base 16 may have any length.
_long = st.builds(lambda digits: b"0x" + b"f" * digits, st.sampled_from([300, 5000]))


def configuration(folder: Path) -> Target:
    """TOML files of both kinds: tables of likely and unlikely values, and edits of their bytes."""
    path = folder / "config.toml"

    def check(given: tuple[type, dict[str, Any], list | None, bytes]) -> str:
        kind, tables, changes, long = given
        data = tomli_w.dumps(tables).encode() if _writable(tables) else b""
        if changes is not None:
            data = edited(data, changes)
        if long:
            data = data.replace(b" = 1", b" = " + long)
        path.write_bytes(data)
        read = _read(data)
        try:
            config = read_tables(path, kind)
        except ValueError as error:
            return refused(error, named=f"{path}: ")
        require(read is not None, "what is no TOML was taken")
        # What was read is what stands there, the rest is default, and it can be written again.
        defaults = dataclasses.asdict(kind()) if kind is RunConfig else {}
        for table, fields in dataclasses.asdict(config).items():
            for name, value in (fields or {}).items():
                if name in (read or {}).get(table, {}):
                    given_value = (read or {})[table][name]
                    require(same(value, type(value)(given_value)), f"{table}.{name} is {value!r}")
                elif table in defaults:
                    require(same(value, defaults[table][name]), f"{table}.{name} is {value!r}")
        path.write_text(format_config(config), encoding="utf-8")
        again = read_tables(path, kind)
        require(again == config and not differences(config, again), f"{again} was {config}")
        return "accepted"

    inputs = st.tuples(
        st.sampled_from([RunConfig, SampleRunConfig]),
        _tables,
        st.one_of(st.none(), edits),
        st.one_of(st.just(b""), _long),
    )
    return Target("configuration", inputs, check)


def _read(data: bytes) -> dict[str, Any] | None:
    """The tables of a file, None where it has none.

    A text file may end its lines in other ways, and begin with a byte-order mark.
    """
    try:
        return tomllib.loads(data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n"))
    except (ValueError, RecursionError):
        return None


def _writable(tables: dict[str, Any]) -> bool:
    """Whether TOML can say it: integers of so many digits are beyond Python's own writer."""
    return all(
        not (isinstance(value, int) and abs(value) >= 10**4000)
        for fields in tables.values()
        for value in fields.values()
    )
