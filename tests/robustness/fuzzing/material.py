"""Strategies that several targets draw from: hostile text, numbers, JSON, and edits of bytes."""

import string
from typing import Any

from hypothesis import strategies as st

_CODE_POINTS = (
    "\0\t\n\r\x1b\x7f\x85\x9b \"'\\#=[]{}:,.-+0e\u00e9\u2028\ufeff\ufffd\U0001f99e\U0010ffff"
)
_SURROGATES = "\ud800\udcff\udfff"

plain_text = st.one_of(
    st.text(string.ascii_letters + " \n", max_size=12),
    st.text(_CODE_POINTS, max_size=8),
    st.text(max_size=8),
)
"""Text that UTF-8 can hold."""

any_text = st.one_of(plain_text, st.text(_CODE_POINTS + _SURROGATES, max_size=6))
"""Text in which lone surrogates may stand."""

integers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([0, -1, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 10**19]),
    st.integers(),
)
floats = st.one_of(
    st.floats(),
    st.sampled_from([0.0, -0.0, 1.0, 0.5, 5e-324, 1e-310, 1e308, float("nan"), float("inf")]),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), integers, floats, any_text),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(any_text, inner, max_size=4)
    ),
    max_leaves=8,
)

# Each is an operation, where (as a fraction of the length, so that it fits any file) and what.
_PLACES = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 0.5, 1 - 2**-53]))
_CHUNKS = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(
        [
            *(b"\0", b"\n", b"\r\n", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"{", b"}", b'"'),
            *(b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"nan", b"Infinity", b"-1", b"1e999"),
            *(b"true", b"null", b"\xff\xff\xff\xff", b"\0\0\0\0\0\0\0\x80", b"= ", b"\n[data]\n"),
        ]
    ),
)
edits = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "insert", "delete", "cut", "flip", "repeat"]),
        _PLACES,
        _CHUNKS,
    ),
    min_size=1,
    max_size=3,
)
"""A few edits of the bytes of a file, for `edited`."""


def edited(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """The bytes after some edits."""
    for kind, place, chunk in changes:
        at = int(place * len(data))
        match kind:
            case "overwrite":
                data = data[:at] + chunk + data[at + len(chunk) :]
            case "insert":
                data = data[:at] + chunk + data[at:]
            case "delete":
                data = data[:at] + data[at + len(chunk) :]
            case "cut":
                data = data[:at]
            case "flip" if data:
                flipped = data[at] ^ (1 << chunk[0] % 8)
                data = data[:at] + bytes([flipped]) + data[at + 1 :]
            case "repeat":
                data = data[:at] + data[at : at + 40 * len(chunk)] + data[at:]
    return data


def same(left: Any, right: Any) -> bool:
    """Whether two values of JSON or TOML are equal in type and value, NaN to NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)
