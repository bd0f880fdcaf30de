"""Vocabularies: exact round trips, counts of characters, and loading what cannot be trusted."""

import functools
import itertools
import json
import pickle
import re
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn.text.vocabulary import (
    MAX_TOKEN_BYTES,
    BytePairVocabulary,
    CharacterVocabulary,
    FrequentVocabulary,
    UnknownCharacter,
    build_vocabulary,
    parse_tokenizer,
    vocabulary_from_dict,
)

TEXT = (
    "The lobster and the lobsters, the 🦞🦞 of the sea: e\u0301 and é,\n\n  indented\tlines\n"
    "ééé the the then\0 lobsters\r\n"
) * 4
# Any text UTF-8 can hold, with what is awkward in it made frequent.
TEXTS = st.text() | st.text(st.sampled_from("the lobsér\n\r\t\0\x0b\u0085\u2028\ufeff 🦞e\u0301"))


@functools.cache
def byte_pairs():
    return build_vocabulary("bpe:280", TEXT)


@pytest.fixture(params=["character", "byte_pair"])
def either(request):
    return build_vocabulary("character", TEXT) if request.param == "character" else byte_pairs()


# Both kinds


def test_round_trip_of_the_text_it_was_built_from(either):
    ids = either.encode(TEXT)
    assert ids.dtype == np.int32
    assert 0 <= ids.min() <= ids.max() < either.size
    assert either.decode(ids) == TEXT
    assert either.characters(ids) == len(TEXT)


def test_empty_text_is_no_tokens(either):
    assert either.encode("").shape == (0,)
    assert either.encode("").dtype == np.int32
    assert either.decode([]) == ""
    assert either.characters([]) == 0


def test_json_round_trip_gives_an_equal_vocabulary(either):
    # Not escaped, and in UTF-8: what is written must be a valid file.
    saved = json.dumps(either.to_dict(), ensure_ascii=False).encode("utf-8")
    loaded = vocabulary_from_dict(json.loads(saved))
    assert loaded == either
    assert hash(loaded) == hash(either)
    assert loaded.size == either.size
    np.testing.assert_array_equal(loaded.encode(TEXT), either.encode(TEXT))


def test_building_is_deterministic():
    for tokenizer in ("character", "bpe:300"):
        vocabularies = {build_vocabulary(tokenizer, TEXT) for _ in range(3)}
        assert len(vocabularies) == 1


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([0, -1], "got -1 at position 1, expected 0 to"),
        ([0, 2, 10**6], "got 1000000 at position 2"),
        ([0.0], "got float64"),
        ([True], "got bool"),
        ([[0, 1]], r"shape \(1, 2\), expected integers in 1 dim"),
        (0, r"shape \(\)"),
    ],
)
def test_decode_refuses_what_are_not_ids(either, ids, reason):
    with pytest.raises(ValueError, match=reason):
        either.decode(ids)


def test_ids_end_at_size(either):
    either.decode([either.size - 1])
    with pytest.raises(ValueError, match=f"expected 0 to {either.size - 1}"):
        either.characters([either.size])


def test_characters_counts_a_batch_of_blocks(either):
    ids = either.encode(TEXT)
    count = ids.size // 7 * 7
    assert either.characters(ids[:count].reshape(7, -1)) == either.characters(ids[:count])
    assert either.token_characters.shape == (either.size,)
    assert either.token_characters[ids].sum() == len(TEXT)


def test_vocabularies_are_frozen_and_picklable(either):
    either.encode("the")
    with pytest.raises(AttributeError):
        either.symbols = ()
    assert pickle.loads(pickle.dumps(either)) == either


@pytest.mark.parametrize("text", ["", "a\ud800b"])
def test_building_needs_text(text):
    for tokenizer in ("character", "bpe:300"):
        with pytest.raises(ValueError, match=r"empty text|lone surrogate"):
            build_vocabulary(tokenizer, text)


@pytest.mark.parametrize(
    ("tokenizer", "parts"),
    [
        ("character", ("character", 0)),
        ("frequent:2", ("frequent", 2)),
        ("bpe:257", ("bpe", 257)),
        ("bpe:0512", ("bpe", 512)),
    ],
)
def test_parse_tokenizer(tokenizer, parts):
    assert parse_tokenizer(tokenizer) == parts


def test_build_refuses_an_unknown_tokenizer():
    with pytest.raises(ValueError, match=r"tokenizer: got 'words', expected .*'bpe:512'"):
        build_vocabulary("words", TEXT)


@pytest.mark.parametrize("tokenizer", ["frequent:1", "frequent:", "bpe:256", "frequent:1000000"])
def test_sizes_that_no_vocabulary_has(tokenizer):
    with pytest.raises(ValueError, match=f"tokenizer: got '{tokenizer}', expected .*'frequent:16'"):
        parse_tokenizer(tokenizer)


# Frequent characters


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_fewer_symbols_than_one_and_all_others_are_refused(size):
    with pytest.raises(ValueError, match=f"size is {size}: expected at least 2"):
        FrequentVocabulary.from_text("aaabbc", size)


def test_frequent_characters_are_kept_and_all_others_are_one_symbol():
    frequent = build_vocabulary("frequent:4", "aaaa bbb cc dd e")
    # The blank is there four times, as often as a; c and d tie, and the smaller code point wins.
    assert frequent.symbols == (" ", "a", "b")
    assert frequent.size == 4
    assert frequent.encode("ab cz").tolist() == [1, 2, 0, 3, 3]
    assert frequent.encode("").shape == (0,)
    assert frequent.decode([1, 2, 0, 3]) == "ab \ufffd"
    assert frequent.characters([1, 3]) == 2
    assert frequent.token_characters.tolist() == [1] * 4
    assert vocabulary_from_dict(json.loads(json.dumps(frequent.to_dict()))) == frequent


@given(TEXTS.filter(lambda text: len(set(text) - {"\ufffd"}) >= 3))
def test_frequent_vocabulary_agrees_with_counting(text):
    frequent = build_vocabulary("frequent:3", text)
    counts = Counter(text.replace("\ufffd", ""))
    left_out = set(counts) - set(frequent.symbols)
    assert min(counts[kept] for kept in frequent.symbols) >= max(counts[c] for c in left_out)
    shown = "".join(c if c in frequent.symbols else "\ufffd" for c in text)
    assert frequent.decode(frequent.encode(text)) == shown


def test_a_text_of_too_few_characters():
    with pytest.raises(ValueError, match="'frequent:4' for a text of 2 distinct characters"):
        build_vocabulary("frequent:4", "abab\ufffd")


@pytest.mark.parametrize("symbols", [(), ("b", "a"), ("\ufffd",), ("ab",)])
def test_frequent_symbols_that_cannot_be(symbols):
    with pytest.raises(ValueError, match="symbols: "):
        vocabulary_from_dict({"kind": "frequent", "symbols": list(symbols)})


# Characters


@given(TEXTS.filter(bool))
def test_characters_round_trip(text):
    characters = build_vocabulary("character", text)
    ids = characters.encode(text)
    assert list(characters.symbols) == sorted(set(text))
    assert ids.tolist() == [characters.symbols.index(c) for c in text]
    assert characters.decode(ids) == text
    assert vocabulary_from_dict(json.loads(json.dumps(characters.to_dict()))) == characters


@pytest.mark.parametrize(
    ("text", "character", "position", "distinct", "code"),
    [
        ("abxaxy", "x", 2, 2, "U+0078"),
        ("ab\n", "\n", 2, 1, "U+000A"),
        ("\0ab", "\0", 0, 1, "U+0000"),
        ("c🦞", "c", 0, 2, "U+0063"),  # between two symbols
        ("🦞", "🦞", 0, 1, "U+1F99E"),  # beyond the last
        ("b\udfffa\ud800", "\udfff", 1, 2, "U+DFFF"),
    ],
)
def test_unknown_character_is_named(text, character, position, distinct, code):
    with pytest.raises(UnknownCharacter) as raises:
        CharacterVocabulary(("a", "b", "d")).encode(text)
    error = raises.value
    assert (error.character, error.position, error.distinct) == (character, position, distinct)
    message = str(error)
    for part in (repr(character), code, f"position {position} ", f"{distinct} distinct"):
        assert part in message
    assert "\n" not in message
    assert ("surrogate" in message) == ("\ud800" <= character <= "\udfff")
    assert str(pickle.loads(pickle.dumps(error))) == message


@pytest.mark.parametrize(
    ("symbols", "reason"),
    [
        ((), "1 to 262144"),
        (["a"], "expected a tuple"),
        ("ab", "expected a tuple"),
        (None, "expected a tuple"),
        (("b", "a"), "'a' follows 'b'"),
        (("a", "a"), "'a' follows 'a'"),
        (("ab",), "single characters"),
        (("",), "single characters"),
        ((1,), "single characters"),
        (("a", "\ud800"), "no surrogates"),
        (("a",) * (2**18 + 1), "1 to 262144"),
    ],
)
def test_character_vocabulary_refuses_bad_symbols(symbols, reason):
    with pytest.raises(ValueError, match=reason) as raises:
        CharacterVocabulary(symbols)
    assert len(str(raises.value)) < 250


# Byte pairs


@given(TEXTS)
@settings(deadline=None)
def test_byte_pairs_round_trip(text):
    ids = byte_pairs().encode(text)
    assert byte_pairs().decode(ids) == text
    assert byte_pairs().characters(ids) == len(text)


@given(TEXTS, st.data())
@settings(deadline=None)
def test_characters_add_up_over_any_cut(text, data):
    ids = byte_pairs().encode(text)
    cut = data.draw(st.integers(0, ids.size))
    assert byte_pairs().characters(ids[:cut]) + byte_pairs().characters(ids[cut:]) == len(text)


def test_a_character_cut_in_two_counts_for_its_first_part():
    plain = BytePairVocabulary(())
    ids = plain.encode("a🦞é")
    assert ids.tolist() == list("a🦞é".encode())  # ids below 256 are the bytes
    assert plain.token_characters[ids].tolist() == [1, 1, 0, 0, 0, 1, 0]
    assert plain.decode(ids[:3]) == "a\ufffd"


@given(TEXTS, st.data())
@settings(deadline=None)
def test_what_is_shown_of_a_text_is_the_text(text, data):
    """And what is shown of a part of it is the part, with the bytes of a cut character in full."""
    vocabulary = byte_pairs()
    ids = vocabulary.encode(text)
    shown = vocabulary.display(ids)
    assert "".join(shown) == text
    assert [len(each) for each in shown] == vocabulary.token_characters[ids].tolist()
    cut = data.draw(st.integers(0, ids.size))
    for part in (ids[:cut], ids[cut:]):
        shown = "".join(vocabulary.display(part)).encode()
        held = re.sub(rb"<0x([0-9A-F]{2})>", lambda byte: bytes.fromhex(byte[1].decode()), shown)
        assert held == b"".join(vocabulary.tokens[token] for token in part)


def test_a_byte_of_no_character_is_shown_in_hexadecimal():
    vocabulary = BytePairVocabulary(((97, 0xC3),))  # a token that ends within a character
    assert vocabulary.display([256, 0xA9, 98]) == ["aé", "", "b"]
    assert vocabulary.display([256]) == ["a<0xC3>"]
    assert vocabulary.display([0xA9, 256, 98]) == ["<0xA9>", "a<0xC3>", "b"]
    assert vocabulary.display([0xF0, 0x9F, 0xA6, 0x9E]) == ["🦞", "", "", ""]
    assert vocabulary.display([0xF0, 0x9F, 0xA6]) == ["<0xF0>", "<0x9F>", "<0xA6>"]
    assert vocabulary.display([0xED, 0xB2, 0x80]) == ["<0xED>", "<0xB2>", "<0x80>"]  # a surrogate
    assert vocabulary.display([*"\ufffd".encode()]) == ["\ufffd", "", ""]  # which the text holds
    assert vocabulary.display([]) == []
    with pytest.raises(ValueError, match="ids: got 257 at position 0, expected 0 to 256"):
        vocabulary.display([257])


def test_characters_are_shown_as_they_are():
    for tokenizer in ("character", "frequent:3"):
        vocabulary = build_vocabulary(tokenizer, "aaab\nécd")
        ids = vocabulary.encode("abé\n")
        assert "".join(vocabulary.display(ids)) == vocabulary.decode(ids)
        assert len(vocabulary.display(ids)) == 4


def test_first_merge_is_the_most_frequent_pair():
    words = ["banana", "bandana", "nab", "cabana", "anvil"]
    pairs = Counter(pair for word in words for pair in itertools.pairwise(word.encode()))
    [(commonest, count), (_, second)] = pairs.most_common(2)
    assert count > second
    vocabulary = build_vocabulary("bpe:257", "\n".join(words))
    assert vocabulary.merges == (commonest,)
    assert vocabulary.tokens[256] == b"an"


@given(st.text("thelobsrs", min_size=1, max_size=12))
@settings(deadline=None)
def test_encoding_applies_the_merges_in_their_order(word):
    vocabulary = byte_pairs()
    parts = [bytes([byte]) for byte in word.encode()]
    for left, right in vocabulary.merges:  # a merge can only be used once those before it are
        pair = (vocabulary.tokens[left], vocabulary.tokens[right])
        index = 0
        while index < len(parts) - 1:
            if (parts[index], parts[index + 1]) == pair:
                parts[index : index + 2] = [pair[0] + pair[1]]
            index += 1
    assert [vocabulary.tokens[i] for i in vocabulary.encode(word)] == parts


def test_byte_pairs_shorten_the_text_they_learned():
    ids = byte_pairs().encode("the lobsters\n")
    assert byte_pairs().size == 280
    assert len(ids) <= 6


def test_a_short_text_yields_a_smaller_vocabulary():
    vocabulary = build_vocabulary("bpe:1000", "aaaa bc")
    assert 256 < vocabulary.size < 1000
    assert vocabulary.size == len(vocabulary.tokens) == len(set(vocabulary.tokens))
    assert b"bc" not in vocabulary.tokens  # seen once: it would only memorise


def test_no_token_spans_lines_or_exceeds_the_limit():
    vocabulary = build_vocabulary("bpe:400", ("=" * 1000 + "\n\n\n") * 3)
    assert max(map(len, vocabulary.tokens)) <= MAX_TOKEN_BYTES
    assert not any(b"\n" in token and len(token) > 1 for token in vocabulary.tokens)


def test_many_lines_are_encoded_in_batches(monkeypatch):
    ids = byte_pairs().encode(TEXT)
    monkeypatch.setattr("probattn.text.byte_pairs._LINES_PER_CALL", 2)
    np.testing.assert_array_equal(byte_pairs().encode(TEXT), ids)


def test_a_lone_surrogate_is_an_unknown_character():
    with pytest.raises(UnknownCharacter, match=r"'\\udc00' .*lone surrogate") as raises:
        byte_pairs().encode("ab\udc00\ud800\ud800")
    assert (raises.value.position, raises.value.distinct) == (2, 2)


def test_two_merges_may_make_the_same_token():
    merges = ((97, 98), (98, 99), (256, 99), (97, 257))  # ab, bc, ab+c, a+bc
    vocabulary = BytePairVocabulary(merges)
    assert vocabulary.tokens[256:] == (b"ab", b"bc", b"abc")
    assert vocabulary.decode(vocabulary.encode("abcabbc")) == "abcabbc"


@pytest.mark.parametrize(
    ("merges", "reason"),
    [
        ([], "expected a tuple"),
        (((97,),), r"merges\[0\].*two ids"),
        (((97, 98, 99),), "two ids"),
        (([97, 98],), "two ids"),
        ((97,), "two ids"),
        (((97, 256),), "0 to 255"),
        (((97, 98), (257, 97)), r"merges\[1\].*0 to 256"),
        (((-1, 97),), "two ids"),
        (((True, 97),), "two ids"),
        (((97.0, 98),), "two ids"),
        (((97, 98), (97, 98)), "distinct pairs"),
        (((97, 97), *((i, i) for i in range(256, 300))), "a token of 128 bytes"),
    ],
)
def test_byte_pair_vocabulary_refuses_bad_merges(merges, reason):
    with pytest.raises(ValueError, match=reason) as raises:
        BytePairVocabulary(merges)
    assert len(str(raises.value)) < 250


def test_missing_library_says_what_to_install(monkeypatch):
    fresh = BytePairVocabulary(byte_pairs().merges)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for use in (lambda: build_vocabulary("bpe:300", TEXT), lambda: fresh.encode("the")):
        with pytest.raises(ImportError, match=r"pip install 'probattn\[bpe\]'"):
            use()
    assert fresh.decode([116, 104, 101]) == "the"  # reading a run's tokens needs no library
    assert build_vocabulary("character", TEXT).size == len(set(TEXT))


# Loading


NESTED = functools.reduce(lambda inner, _: [inner], range(500), [])


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        {"kind": "character"},
        {"kind": "words", "symbols": ["a"]},
        {"kind": ["character"], "symbols": ["a"]},
        {"kind": "character", "symbols": ["a"], "more": 1},
        {"kind": "character", "merges": []},
        {"kind": "character", "symbols": "ab"},
        {"kind": "character", "symbols": {"a": 0}},
        {"kind": "character", "symbols": [["a"]]},
        {"kind": "character", "symbols": ["b", "a"]},
        {"kind": "character", "symbols": []},
        {"kind": "character", "symbols": NESTED},
        {"kind": "byte_pair", "merges": None},
        {"kind": "byte_pair", "merges": "ab"},
        {"kind": "byte_pair", "merges": [97, 98]},
        {"kind": "byte_pair", "merges": [["a", "b"]]},
        {"kind": "byte_pair", "merges": [[[97], [98]]]},
        {"kind": "byte_pair", "merges": [[0, 256]]},
        {"kind": "byte_pair", "merges": NESTED},
        {1: 2, "kind": "byte_pair"},
    ],
)
def test_loading_refuses_what_is_not_a_vocabulary(values):
    with pytest.raises(ValueError, match=r"got|follows") as raises:
        vocabulary_from_dict(values)
    assert "\n" not in str(raises.value)
    assert len(str(raises.value)) < 300
