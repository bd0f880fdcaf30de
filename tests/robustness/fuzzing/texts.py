"""Targets: the vocabulary reader with every kind of vocabulary, and the reader of corpora."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from probattn.text.corpora import DataConfig, DataError, load_corpus, read_text
from probattn.text.vocabulary import (
    UnknownCharacter,
    Vocabulary,
    build_vocabulary,
    vocabulary_from_dict,
)
from tests.robustness.fuzzing.material import (
    any_text,
    edited,
    edits,
    floats,
    integers,
    json_values,
    same,
)
from tests.robustness.fuzzing.target import Target, refused, require

_symbols = st.one_of(
    st.sets(st.characters(codec="utf-8"), min_size=1, max_size=12).map(sorted),
    st.lists(any_text, max_size=5),
)
_ids = st.integers(0, 270)
_merges = st.lists(
    st.one_of(st.tuples(_ids, _ids).map(list), json_values),
    max_size=8,
)
_saved = st.one_of(
    st.fixed_dictionaries(
        {"kind": st.sampled_from(["character", "frequent"]), "symbols": _symbols}
    ),
    st.fixed_dictionaries({"kind": st.just("byte_pair"), "merges": _merges}),
    st.fixed_dictionaries(
        {"kind": st.one_of(st.sampled_from(["character", "byte_pair"]), json_values)},
        optional={"symbols": json_values, "merges": json_values, "other": json_values},
    ),
    json_values,
)
_settings = st.one_of(
    st.just("character"),
    st.integers(0, 10).map("frequent:{}".format),
    st.sampled_from(["bpe:257", "bpe:260", "bpe:256", "bpe:999999999", "frequent:٣", "bpe:", ""]),
    any_text,
)
_token_ids = st.one_of(
    st.lists(st.integers(-2, 300), max_size=6),
    st.lists(st.one_of(integers, floats, st.booleans(), any_text), max_size=4),
    st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=3),
)


def vocabulary(folder: Path) -> Target:
    """What data.json may hold as a vocabulary, tokenizer settings, texts and token ids."""
    del folder

    def check(given: tuple[Any, str | None, str, Any]) -> str:
        saved, setting, text, ids = given
        try:
            if setting is None:
                found = vocabulary_from_dict(saved)
                require(same(found.to_dict(), dict(saved)), f"{found.to_dict()} is not {saved}")
            else:
                found = build_vocabulary(setting, text)
        except ValueError as error:
            return refused(error)
        _check_size(found)
        outcome = _check_text(found, text, known=setting is not None)
        return outcome if _check_ids(found, ids) else f"{outcome}, ids refused"

    inputs = st.tuples(_saved, st.one_of(st.none(), _settings), any_text, _token_ids)
    return Target("vocabulary", inputs, check)


def _check_size(found: Vocabulary) -> None:
    require(found.token_characters.shape == (found.size,), "token_characters is not (size,)")
    require(vocabulary_from_dict(found.to_dict()) == found, "it does not come back from its dict")


def _check_text(found: Vocabulary, text: str, *, known: bool) -> str:
    """Encoding and decoding a text are each other's inverse, and every character counts once."""
    kind = found.to_dict()["kind"]
    try:
        ids = found.encode(text)
    except UnknownCharacter as error:
        refused(error, named="unknown character")
        expected = next(
            (
                position
                for position, character in enumerate(text)
                if "\ud800" <= character <= "\udfff"
                or (kind == "character" and character not in found.to_dict()["symbols"])
            ),
            None,
        )
        require(not known and error.position == expected, f"{error.position}, not {expected}")
        require(error.character == text[error.position], "another character than the first")
        return "accepted, text refused"
    kept = found.to_dict().get("symbols", ())
    shown = "".join(c if c in kept else "\ufffd" for c in text) if kind == "frequent" else text
    require(found.decode(ids) == shown, f"{found.decode(ids)!r} was {text!r}")
    require(found.characters(ids) == len(text), "characters that count twice or never")
    require(ids.dtype == np.int32 and np.all((ids >= 0) & (ids < found.size)), "ids beyond size")
    return "accepted"


def _check_ids(found: Vocabulary, ids: Any) -> bool:
    # To NumPy as to Python False is a zero, but an array of nothing else is one of truth values.
    valid = (
        isinstance(ids, list)
        and all(isinstance(token, int) and 0 <= token < found.size for token in ids)
        and not (ids and all(isinstance(token, bool) for token in ids))
    )
    try:
        text = found.decode(ids)
    except ValueError as error:
        refused(error)
        require(not valid, f"ids {ids} were refused")
        return False
    require(valid or len(ids) == 0, f"ids {ids} decoded to {text!r}")
    if found.to_dict()["kind"] != "byte_pair":
        require(len(text) == len(ids), "as many characters as tokens")
    return True


_words = st.lists(
    st.sampled_from(["a", "\u00e9", "\U0001f99e", "\n", "\r", "\r\n", "\ufeff", "\0"]), max_size=20
).map("".join)
_bytes = st.one_of(
    _words.map(str.encode),
    st.tuples(_words.map(str.encode), edits).map(lambda pair: edited(*pair)),
    st.binary(max_size=30),
)


def corpus(folder: Path) -> Target:
    """Files of any bytes as a corpus and its validation text, and every field that names them."""
    paths = [folder / "text", folder / "validation"]
    names = [str(path) for path in paths]
    elsewhere = any_text.filter(lambda name: not _exists(name))

    def check(given: tuple[bytes, bytes, dict[str, Any]]) -> str:
        *contents, fields = given
        for path, data in zip(paths, contents, strict=True):
            path.write_bytes(data)
        texts = [_text(data) for data in contents]
        for path, text in zip(paths, texts, strict=True):
            try:
                require(read_text(path) == text, f"{path.name} was read as another text")
            except DataError as error:
                refused(error, named=repr(str(path)))
                require(text is None, f"{path.name} is UTF-8 and was refused: {error}")
        try:
            config = DataConfig(**fields)
            found = load_corpus(config)
        except ValueError as error:
            return refused(error)
        require(config.source == names[0], f"{config.source} was found")
        require(config.validation in (None, names[1]), f"{config.validation} was found")
        whole, second = texts
        require(whole is not None, "a text that is no UTF-8 was taken")
        if config.validation is None:
            require(found.train + found.validation == whole, "the parts are not the whole")
            share = round(len(str(whole)) * config.validation_fraction)
            most = len(str(whole)) - 1
            require(len(found.validation) == min(max(share, 1), most), "another share held out")
        else:
            require((found.train, found.validation) == (whole, second), "other texts")
        data = found.train.encode() + b"\xff" + found.validation.encode()
        require(found.sha256 == hashlib.sha256(data).hexdigest(), "another checksum")
        return "accepted"

    fields = st.fixed_dictionaries(
        {"source": st.one_of(*[st.just(names[0])] * 4, elsewhere, json_values)},
        optional={
            "validation": st.one_of(st.just(names[1]), st.none(), elsewhere, json_values),
            "validation_fraction": st.one_of(st.floats(0, 1), floats, integers, json_values),
            "tokenizer": st.one_of(_settings, json_values),
        },
    )
    return Target("corpus", st.tuples(_bytes, _bytes, fields), check)


def _text(data: bytes) -> str | None:
    """The text of a file by Python's own reader, None where it is none or empty."""
    try:
        stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline=None)
        return stream.read() or None
    except UnicodeDecodeError:
        return None


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
