"""Tokenizers of other people's models, from tokenizer.json and from GGUF metadata."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn.inference.pretrained.errors import PretrainedError
from probattn.inference.pretrained.gguf_files import open_gguf
from probattn.inference.pretrained.gguf_tokenizers import gguf_tokenizer
from probattn.inference.pretrained.pretrained_tokenizer import (
    PretrainedTokenizer,
    read_tokenizer,
    tokenizer_from_dict,
)
from probattn.text import pieces
from probattn.text.pieces import Text, checksum
from probattn.text.tokens import token_arrays
from probattn.text.vocabulary import UnknownCharacter
from tests.support.gguf_bytes import ARRAY, STRING, gguf, key
from tests.support.refusals import refusal
from tests.support.tokenizer_files import (
    PIECES,
    SCORES,
    TEXT,
    TYPES,
    byte_level,
    definition,
    merged,
)

COMPOSED = ("olmo", "qwen2")
NAMES = ("gpt-2", "smollm", "llama-bpe", *COMPOSED)
ANY = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from([*TEXT.split(" "), " ", "  ", "\n", "\r\n", "'s", "12", "345", "<|end|>"]),
        max_size=12,
    ).map("".join),
)


def metadata(name, content):
    return key(f"tokenizer.ggml.{name}", *content)


def opened(folder, **keys):
    path = folder / "x.gguf"
    path.write_bytes(gguf([metadata(name, content) for name, content in keys.items()]))
    return gguf_tokenizer(open_gguf(path))


def byte_level_keys(name):
    model = definition(byte_level(name))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "model": (STRING, "gpt2"),
        "pre": (STRING, name),
        "tokens": (ARRAY, (STRING, tokens)),
        "token_type": (ARRAY, (5, [3 if each == "<|end|>" else 1 for each in tokens])),
        "merges": (ARRAY, (STRING, [" ".join(pair) for pair in model["merges"]])),
        "bos_token_id": (4, 0),
    }


SENTENCEPIECE = {
    "model": (STRING, "llama"),
    "tokens": (ARRAY, (STRING, PIECES)),
    "scores": (ARRAY, (6, SCORES)),
    "token_type": (ARRAY, (5, TYPES)),
    "bos_token_id": (4, 1),
}


@pytest.fixture(scope="module", name="of")
def of_fixture(tmp_path_factory):
    """The tokenizers of GGUF files, by the name of their pre-tokenizer."""
    return {
        **{name: opened(tmp_path_factory.mktemp(name), **byte_level_keys(name)) for name in NAMES},
        "llama": opened(tmp_path_factory.mktemp("llama"), **SENTENCEPIECE),
    }


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(text=ANY)
def test_a_gguf_file_encodes_as_the_tokenizer_json_that_it_came_from(of, name, text):
    ids = of[name].encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == byte_level(name).encode(text, add_special_tokens=False).ids
    expected = unicodedata.normalize("NFC", text) if name in COMPOSED else text
    assert of[name].decode(ids) == expected
    assert of[name].characters(ids) == len(expected)
    assert "".join(of[name].display(ids)) == expected


def test_the_names_of_pre_tokenizers_matter(of):
    """Otherwise the comparison above would show nothing."""
    ids = {tuple(of[name].encode("it'll 1234 DON'T  x\n\ny e\u0301")) for name in NAMES}
    assert len(ids) == len(NAMES)


def test_default_cuts_at_punctuation_and_after_three_digits(tmp_path):
    """As llama.cpp has it: the tokens of "12345" are those of "123" and "45"."""
    keys = byte_level_keys("gpt-2")
    del keys["pre"]
    found = opened(tmp_path, **keys)
    for whole, parts in (
        ("12345", ["123", "45"]),
        ("a$b", ["a", "$", "b"]),
        ("ab cd", ["ab", " cd"]),
    ):
        apart = [each for part in parts for each in found.encode(part)]
        assert found.encode(whole).tolist() == apart


@given(text=st.text("theingacfbx é<s>0A🦞▁\n", max_size=40))
def test_sentencepiece_merges_by_score(of, text):
    ids = of["llama"].encode(text).tolist()
    if "<s>" not in text:  # which is one token, and parts the text
        assert [PIECES[index] for index in ids] == merged(text)
    assert of["llama"].decode(ids).replace("▁", " ") == text.replace("▁", " ") or "<s>" in text


def test_the_name_of_a_byte_in_a_text_is_not_that_byte(of):
    ids = of["llama"].encode("<0x0A>").tolist()
    assert [PIECES[index] for index in ids] == ["▁", "<0x0A", ">"]


@pytest.mark.parametrize(("name", "ids"), [("llama-bpe", [3]), ("gpt-2", [0, 1, 2])])
def test_a_word_that_is_a_token_is_taken_whole_where_the_tokenizer_does_so(tmp_path, name, ids):
    keys = {
        "model": (STRING, "gpt2"),
        "pre": (STRING, name),
        "tokens": (ARRAY, (STRING, ["a", "b", "c", "abc"])),
        "merges": (ARRAY, (STRING, [])),
        "bos_token_id": (4, 0),
    }
    assert opened(tmp_path, **keys).encode("abc").tolist() == ids


def test_special_tokens_in_a_text_are_tokens(of):
    assert of["llama"].encode("<s>").tolist() == [1]
    assert of["smollm"].encode("a<|end|>").tolist()[-1] == 0
    assert of["smollm"].decode([0]) == "<|end|>"


def test_what_stands_before_a_text(of, tmp_path):
    assert of["llama"].begins_with == (1,)
    assert of["llama-bpe"].begins_with == (0,)
    assert of["smollm"].begins_with == of["gpt-2"].begins_with == ()
    found = opened(tmp_path, **byte_level_keys("smollm"), add_bos_token=(7, True))
    assert found.begins_with == (0,)
    found = opened(tmp_path, **SENTENCEPIECE, add_bos_token=(7, False))
    assert found.begins_with == ()


def test_a_vocabulary_that_puts_no_space_before_a_text(tmp_path):
    found = opened(tmp_path, **SENTENCEPIECE, add_space_prefix=(7, False))
    assert found.decode(found.encode("the")) == "the"
    assert [PIECES[each] for each in found.encode("the")] == ["t", "he"]
    assert found.decode(found.encode(" the")) == " the"


def test_bytes_of_each_token(of):
    assert of["llama"].tokens[1] == b"<s>"
    assert of["llama"].tokens[3 + 0xE9] == b"\xe9"
    assert of["llama"].tokens[PIECES.index("▁the")] == b" the"
    assert of["llama"].token_characters[[1, 3 + 0xA9, 3 + 0xC3]].tolist() == [3, 0, 1]
    assert of["llama"].display(of["llama"].encode("🦞")) == [" ", "🦞", "", "", ""]
    assert of["llama"].display([3 + 0xC3]) == ["<0xC3>"]


@pytest.mark.parametrize("name", [*NAMES, "llama"])
@settings(max_examples=10)
@given(data=st.data())
def test_ids_decode_as_the_library_decodes_them(of, name, data):
    found = of[name]
    ids = data.draw(st.lists(st.integers(259, found.size - 1), max_size=8))
    library = found._library
    assert found.decode(ids) == library.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["smollm", "llama"])
def test_a_tokenizer_comes_back_from_its_dict(of, name):
    saved = json.loads(json.dumps(of[name].to_dict()))
    again = tokenizer_from_dict(saved)
    assert again.tokens == of[name].tokens
    assert again.encode(TEXT).tolist() == of[name].encode(TEXT).tolist()
    for wrong in ({}, saved | {"kind": "other"}, saved | {"definition": 7}, saved | {"more": 1}):
        refusal(PretrainedError, tokenizer_from_dict, wrong)


def test_a_folder(tmp_path):
    made = byte_level("smollm")
    made.save(str(tmp_path / "tokenizer.json"))
    found = read_tokenizer(tmp_path)
    assert found.encode(TEXT).tolist() == made.encode(TEXT).ids
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    message = refusal(PretrainedError, read_tokenizer, tmp_path)
    assert message.startswith(
        f"{tmp_path}: holds no tokenizer.json beside tokenizer.model: expected"
    )


def test_a_tokenizer_that_cuts_or_fills_up_does_not_do_so_here():
    cutting = definition(byte_level("gpt-2")) | {
        "truncation": {
            **{"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        },
        "padding": {
            **{"strategy": {"Fixed": 4000}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<|end|>"},
        },
    }
    found = PretrainedTokenizer(cutting)
    assert found.decode(found.encode(TEXT)) == TEXT


@pytest.mark.parametrize("scheme", ["always", "never"])
@given(text=st.text("theingacf  ", max_size=20))
def test_words_that_are_marked_before_they_are_merged(of, scheme, text):
    """As newer tokenizers of Llama and Mistral do it, by a step of the library's own."""
    mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    marked = {"normalizer": None, "pre_tokenizer": mark, "decoder": mark}
    found = PretrainedTokenizer(of["llama"].definition | marked)
    ids = found.encode(text)
    # A space that stands there already is taken for the mark. (The library's own decoder takes
    # away all the spaces of the first token.)
    assert found.decode(ids) == (text.removeprefix(" ") if scheme == "always" else text)


def characters(symbols, **changes):
    """A tokenizer of characters, which drops what it does not know without a word."""
    model = {"type": "BPE", "vocab": {each: at for at, each in enumerate(symbols)}, "merges": []}
    return {"model": model | changes, "decoder": {"type": "Fuse"}, "added_tokens": []}


def test_a_text_that_it_cannot_represent_is_refused_and_not_cut():
    found = PretrainedTokenizer(characters("abé"))
    assert found.decode(found.encode("aébé")) == "aébé"
    message = refusal(UnknownCharacter, found.encode, "abxayé")
    assert message.startswith(
        "unknown character 'x' (U+0078) at position 2 of the text, which holds"
    )
    assert "2 distinct character(s)" in message
    message = refusal(UnknownCharacter, found.encode, "a\ud800")
    assert "it is a lone surrogate" in message
    found = PretrainedTokenizer(characters(["<unk>", "a", "b"], unk_token="<unk>"))
    assert "unknown character 'c'" in refusal(UnknownCharacter, found.encode, "abc")


def test_a_long_text_is_encoded_in_pieces_that_cut_no_token(of, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 11)
    text = Text.of("one two three, four five six\n" * 5)
    for found in (of["gpt-2"], of["smollm"]):
        [ids] = token_arrays(found, [text], checksum([text]))
        np.testing.assert_array_equal(ids, found.encode(text.read()))


def test_an_unknown_character_of_a_long_text_is_said_with_its_place(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 11)
    text = Text.of("ab ba ab\n" * 9 + "abx\n")
    with pytest.raises(UnknownCharacter) as raises:
        token_arrays(PretrainedTokenizer(characters("ab \n")), [text], checksum([text]))
    assert raises.value.args == ("x", 83, 1)


def test_a_byte_without_a_token_is_refused():
    few = definition(byte_level("gpt-2"))
    model = few["model"]
    del model["vocab"]["Ã"]
    model["merges"] = [pair for pair in model["merges"] if "Ã" not in "".join(pair)]
    found = PretrainedTokenizer(few)
    assert "unknown character 'é'" in refusal(UnknownCharacter, found.encode, "caf é")


@pytest.mark.parametrize("ids", [[-1], [330], [0.5], [[1]]])
def test_ids_that_are_none(of, ids):
    refusal(ValueError, of["smollm"].decode, ids)


ADDED = {
    "special": True,
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
}
WRONG = {
    "nothing": ({}, "has a model of kind None: expected BPE"),
    "no table": ({"model": [[1]]}, "has a model of kind None: expected BPE"),
    "Unigram": ({"model": {"type": "Unigram"}}, "has a model of kind 'Unigram': expected BPE"),
    "dropout": (characters("ab", dropout=0.1), "sets dropout to 0.1: expected none"),
    "no vocabulary": (characters("ab", vocab=[]), "has no vocabulary"),
    "an id that is a text": (characters("ab", vocab={"a": "0"}), "has the id '0' of 'a': expected"),
    "an id beyond all": (characters("ab", vocab={"a": 2**32 - 1}), "has the id 4294967295 of 'a'"),
    "an id twice": (characters("ab", vocab={"a": 0, "b": 0}), "gives the id 0 to "),
    "a surrogate": (characters(["\ud800"]), "expected text that UTF-8 can hold"),
    "no merges": (characters("ab", merges=None), "has no merges"),
    "a merge of one": (characters("ab", merges=[["a"]]), "has the merge ['a'] as number 0"),
    "a merge of others": (characters("ab", merges=["a c"]), "has the merge 'a c' as number 0"),
    "a merge to nothing": (characters("ab", merges=["a b"]), "whose concatenation is a third"),
    "an added token of another": (
        characters("ab") | {"added_tokens": [{"id": 1, "content": "c", **ADDED}]},
        "adds 'c' as id 1, which is another one's",
    ),
    "an added token elsewhere": (
        characters("ab") | {"added_tokens": [{"id": 9, "content": "c", **ADDED}]},
        "adds 'c' as id 9: expected 2, the next after the vocabulary",
    ),
    "added tokens": (characters("ab") | {"added_tokens": 7}, "has added_tokens that are no list"),
    "no added token": (characters("ab") | {"added_tokens": [7]}, "adds the token None of id None"),
    "a decoder": (
        characters("ab") | {"decoder": {"type": "WordPiece"}},
        "has the decoder 'WordPiece': expected ByteLevel, or",
    ),
    "no decoder": (characters("ab") | {"decoder": None}, "has the decoder None: expected"),
    "a pattern": (
        characters("ab")
        | {
            "pre_tokenizer": {
                **{"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated"},
                "invert": False,
            }
        },
        "is refused by the library tokenizers: ",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_definition_is_refused_in_one_line(tmp_path, case):
    described, reason = WRONG[case]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(described))
    message = refusal(PretrainedError, read_tokenizer, tmp_path)
    assert message.startswith(f"{path}: ")
    assert reason in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no JSON: "),
        (b"\xff", "holds no JSON: "),
        (b"[" * 100_000, "holds no JSON: "),
        (b"[]", "holds a JSON list: expected an object"),
        (b'{"model": 1, "model": 2}', "names 'model' twice: expected each name once"),
    ],
)
def test_a_file_that_is_no_json_object(tmp_path, content, reason):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert reason in refusal(PretrainedError, read_tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": None}, "has None as tokenizer.ggml.model: expected a name; choose a file with"),
        ({"model": (STRING, "bert")}, "has the tokenizer 'bert': expected gpt2 or llama"),
        ({"pre": (STRING, "viking")}, "has the pre-tokenizer 'viking': expected one of gpt-2, "),
        ({"pre": (4, 7)}, "has 7 as tokenizer.ggml.pre: expected a name"),
        ({"tokens": (4, 7)}, "has no list of texts as tokenizer.ggml.tokens"),
        ({"tokens": (ARRAY, (STRING, ["a", "a"])), "token_type": None}, "holds a token twice"),
        (
            {"token_type": (ARRAY, (5, [1]))},
            "has 1 numbers as tokenizer.ggml.token_type: expected 33",
        ),
        ({"merges": None}, "has no list of texts as tokenizer.ggml.merges"),
        ({"merges": (ARRAY, (STRING, ["x yz"]))}, "has the merge ['x', 'yz'] as number 0"),
        ({"merges": (ARRAY, (STRING, ["xyz"]))}, "has the merge ['xyz', ''] as number 0"),
        (
            {"add_bos_token": (4, 1)},
            "has 1 as tokenizer.ggml.add_bos_token: expected a truth value",
        ),
        (
            {"add_bos_token": (7, True), "bos_token_id": (4, 330)},
            "has 330 as tokenizer.ggml.bos_token_id: expected 0 to 329",
        ),
    ],
)
def test_damaged_metadata_is_refused_in_one_line(tmp_path, changes, reason):
    keys = byte_level_keys("smollm") | changes
    given_keys = {name: content for name, content in keys.items() if content is not None}
    assert reason in refusal(PretrainedError, opened, tmp_path, **given_keys)


def test_a_sentencepiece_vocabulary_without_scores_or_with_a_long_piece(tmp_path):
    keys = SENTENCEPIECE | {"scores": (ARRAY, (6, SCORES[1:]))}
    assert "numbers as tokenizer.ggml.scores: expected" in refusal(
        PretrainedError, opened, tmp_path, **keys
    )
    keys = SENTENCEPIECE | {"tokens": (ARRAY, (STRING, [*PIECES[:-1], "a" * 10_000]))}
    message = refusal(PretrainedError, opened, tmp_path, **keys)
    assert "holds a token of 10000 characters: expected at most 256" in message
