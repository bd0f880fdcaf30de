"""Texts as arrays of tokens: their values and types, and what is kept in the user's cache."""

import itertools
import os
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn.text import byte_pairs, pieces, tokens
from probattn.text.byte_pairs import BytePairVocabulary
from probattn.text.corpora import Corpus, DataConfig, load_corpus, open_text
from probattn.text.download import DataError
from probattn.text.pieces import Text, checksum
from probattn.text.tokens import corpus_tokens, corpus_vocabulary, token_arrays
from probattn.text.vocabulary import CharacterVocabulary, UnknownCharacter, build_vocabulary
from tests.support.gguf_bytes import ARRAY, STRING, gguf, key

TRAIN = "A café, a door; the door is open.\n\nIt's 12 o'clock  and\tthe lobster 🦞 is late.\n" * 9
VALIDATION = "The lobster is 12 years old "
TOKENIZERS = ["character", "frequent:9", "bpe:290"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache, into which texts of any length go, read in short pieces."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "CACHED", 1)
    monkeypatch.setattr(pieces, "PIECE", 11)
    return tmp_path / "cache" / "probattn" / "tokens"


@pytest.fixture
def corpus():
    return Corpus("book", TRAIN, VALIDATION, "a book")


def files(cache, ending):
    return sorted(path for path in cache.iterdir() if path.suffix == ending)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Tokenizers as other people publish them; those of SentencePiece in its old and new forms."""
    pytest.importorskip("tokenizers")
    from probattn.inference.pretrained.gguf_files import open_gguf
    from probattn.inference.pretrained.gguf_tokenizers import gguf_tokenizer
    from probattn.inference.pretrained.pretrained_tokenizer import PretrainedTokenizer
    from tests.support import tokenizer_files as known

    path = tmp_path_factory.mktemp("published") / "model.gguf"
    metadata = {
        "model": (STRING, "llama"),
        "tokens": (ARRAY, (STRING, known.PIECES)),
        "scores": (ARRAY, (6, known.SCORES)),
        "token_type": (ARRAY, (5, known.TYPES)),
        "bos_token_id": (4, 1),
    }
    path.write_bytes(gguf([key(f"tokenizer.ggml.{name}", *of) for name, of in metadata.items()]))
    found = {"llama": gguf_tokenizer(open_gguf(path))}
    old = found["llama"].definition
    for scheme, split in itertools.product(("always", "first"), (True, False)):
        mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
        marked = old | {"normalizer": None, "pre_tokenizer": mark}
        found[f"{scheme} {split}"] = PretrainedTokenizer(marked)
    for name in ("gpt-2", "llama-bpe", "qwen2", "smollm", "olmo"):
        found[name] = PretrainedTokenizer(known.definition(known.byte_level(name, 340)))
    return found


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_tokens_are_those_of_the_whole_text(cache, corpus, tokenizer):
    if tokenizer.startswith("bpe"):
        pytest.importorskip("tokenizers")
    vocabulary = corpus_vocabulary(corpus, tokenizer)
    assert vocabulary == build_vocabulary(tokenizer, TRAIN + VALIDATION)
    for found, text in zip(corpus_tokens(corpus, vocabulary), (TRAIN, VALIDATION), strict=True):
        np.testing.assert_array_equal(found, vocabulary.encode(text))
        assert found.dtype == (np.uint16 if vocabulary.size > 256 else np.uint8)
    assert len(files(cache, ".npy")) == 2
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_short_text_is_not_kept(tmp_path, monkeypatch, corpus):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vocabulary = corpus_vocabulary(corpus, "character")
    train, _ = corpus_tokens(corpus, vocabulary)
    np.testing.assert_array_equal(train, vocabulary.encode(TRAIN))
    assert list(tmp_path.iterdir()) == []


def test_the_second_start_encodes_nothing(cache, corpus, monkeypatch):
    first = corpus_tokens(corpus, corpus_vocabulary(corpus, "character"))

    def refuse(*_):
        raise AssertionError("the text was read again")

    monkeypatch.setattr(CharacterVocabulary, "encode", refuse)
    monkeypatch.setattr(tokens, "build_vocabulary", refuse)
    again = corpus_tokens(corpus, corpus_vocabulary(corpus, "character"))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
        assert not other.flags.writeable


def test_other_texts_and_other_vocabularies_have_files_of_their_own(cache, corpus):
    moved = Corpus("book", TRAIN[:-1], TRAIN[-1] + VALIDATION, "divided elsewhere")
    for each in (corpus, moved):
        for tokenizer in TOKENIZERS[:2]:
            vocabulary = corpus_vocabulary(each, tokenizer)
            train, _ = corpus_tokens(each, vocabulary)
            np.testing.assert_array_equal(train, vocabulary.encode(each.train))
    assert len(files(cache, ".npy")) == 2 * 2 * 2
    assert len(files(cache, ".vocabulary")) == 2 * 2


@pytest.mark.parametrize("left", [0, 40, 200])
def test_a_file_that_is_cut_is_made_again(cache, corpus, left):
    vocabulary = corpus_vocabulary(corpus, "character")
    corpus_tokens(corpus, vocabulary)
    for path in (*files(cache, ".npy"), *files(cache, ".vocabulary")):
        os.truncate(path, left)
    assert corpus_vocabulary(corpus, "character") == vocabulary
    train, validation = corpus_tokens(corpus, vocabulary)
    np.testing.assert_array_equal(train, vocabulary.encode(TRAIN))
    np.testing.assert_array_equal(validation, vocabulary.encode(VALIDATION))


@pytest.mark.parametrize("kind", [".npy", ".vocabulary"])
@pytest.mark.parametrize("fault", ["one byte", "another text", "nested", "an earlier version"])
def test_a_file_that_is_not_of_this_text_is_made_again(cache, corpus, kind, fault):
    other = Corpus("other", TRAIN[9:] + "zyx", VALIDATION[::-1], "another book")
    for each in (other, corpus):
        corpus_tokens(each, corpus_vocabulary(each, "character"))
        if each is other:
            others = {path: path.read_bytes() for path in files(cache, kind)}
    mine = sorted(set(files(cache, kind)) - set(others))
    assert mine
    for path, strange in zip(mine, others.values(), strict=True):
        data = bytearray(path.read_bytes())
        data[130] ^= 1  # behind the header of an array
        before = data[:-32] if kind == ".npy" else b'{"kind": "character", "symbols": ["A"]}'
        path.write_bytes(
            {
                "one byte": data,
                "another text": strange,
                "nested": b"[" * 100_000,
                "an earlier version": before,
            }[fault]
        )
    vocabulary = corpus_vocabulary(corpus, "character")
    assert vocabulary == build_vocabulary("character", TRAIN + VALIDATION)
    for found, text in zip(corpus_tokens(corpus, vocabulary), (TRAIN, VALIDATION), strict=True):
        np.testing.assert_array_equal(found, vocabulary.encode(text))


@pytest.mark.parametrize("fault", ["writable by others", "a link", "a file", "full"])
def test_without_a_cache_of_ones_own_tokens_are_made_in_memory(
    cache, corpus, monkeypatch, tmp_path, fault
):
    cache.parent.mkdir(parents=True)
    if fault == "writable by others":
        cache.mkdir()
        cache.chmod(0o777)
    elif fault == "a link":
        (tmp_path / "elsewhere").mkdir()
        cache.symlink_to(tmp_path / "elsewhere")
    elif fault == "a file":
        cache.touch()
    else:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tokens.os, "fsync", full)
    vocabulary = corpus_vocabulary(corpus, "character")
    train, _ = corpus_tokens(corpus, vocabulary)
    np.testing.assert_array_equal(train, vocabulary.encode(TRAIN))
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size] == []


def test_files_that_were_not_used_for_longest_make_room(cache, monkeypatch):
    corpora = [Corpus("book", TRAIN, str(number), "") for number in range(3)]
    vocabulary = CharacterVocabulary.from_text(TRAIN + "012")
    for age, each in zip((20, 30), corpora[:2], strict=True):
        corpus_tokens(each, vocabulary)
        for path in files(cache, ".npy"):
            if path.stat().st_mtime > time.time() - 10:
                os.utime(path, (time.time() - age,) * 2)
    young, old = cache / ".new.young", cache / ".new.old"
    for path in (young, old):
        path.touch()
    os.utime(old, (1, 1))
    first = set(files(cache, ".npy"))
    corpus_tokens(corpora[0], vocabulary)  # used again: the second is now the older one
    monkeypatch.setattr(tokens, "MOST_BYTES", sum(path.stat().st_size for path in first) + 200)
    corpus_tokens(corpora[2], vocabulary)
    assert (young.exists(), old.exists()) == (True, False)
    monkeypatch.setattr(CharacterVocabulary, "encode", None)
    for each in (corpora[0], corpora[2]):
        corpus_tokens(each, vocabulary)
    with pytest.raises(TypeError):
        corpus_tokens(corpora[1], vocabulary)


def test_a_text_that_changes_while_it_is_read_is_refused(cache, tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("a line\n" * 20)
    corpus = load_corpus(DataConfig(source=str(path)))
    with path.open("a") as stream:
        stream.write("a line\n" * 20)
    # What is held out begins where it did, and what comes after it is not of the corpus.
    assert (corpus.train + corpus.validation) == "a line\n" * 20
    path.write_text("another line\n" * 20)
    with pytest.raises(DataError, match="the text has changed while it was read"):
        corpus_tokens(corpus, CharacterVocabulary.from_text("another line\n"))
    assert list(cache.iterdir()) == []


def test_an_unknown_character_is_said_with_its_place_in_the_whole_text(cache):
    text = Text.of("abc" * 10 + "x" + "abc" * 10 + "yx")
    with pytest.raises(UnknownCharacter) as raises:
        token_arrays(CharacterVocabulary(("a", "b", "c")), [text], checksum([text]))
    assert raises.value.args == ("x", 30, 2)


@pytest.mark.parametrize("text", ["one two  three\n", "nospaceatall", " a b", "x\ny z w"])
def test_a_text_is_cut_for_byte_pairs_only_where_no_token_goes_on(text):
    pytest.importorskip("tokenizers")
    vocabulary = BytePairVocabulary.from_text(text * 40, 300)
    whole = vocabulary.encode(text * 40)
    for size in (1, 2, 5, 64):
        cut = Text(lambda size=size: ((text * 40)[i : i + size] for i in range(0, 9999, size)))
        parts = list(cut.paragraphs())
        assert "".join(parts) == text * 40
        np.testing.assert_array_equal(np.concatenate([*map(vocabulary.encode, parts)]), whole)


def test_a_word_that_has_no_end_is_refused_for_byte_pairs(monkeypatch):
    monkeypatch.setattr(pieces, "LONGEST_WORD", 100)
    monkeypatch.setattr(pieces, "PIECE", 10)
    assert list(Text.of("a" * 100).paragraphs()) == ["a" * 100]
    with pytest.raises(ValueError, match="a word of more than 100 characters, expected spaces"):
        list(Text.of("a" * 101).paragraphs())


DOCUMENTS = (
    "the menu\nin the café\n",
    "the thing",
    "\n\n  indented\n\n\n\tagain:\n    it's\n the end  \n \n",
    "日本語。テキスト、" * 9,
    "(café) 1234, the thing; " * 9,
)


@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "in the cache"])
def test_a_folder_and_a_file_of_one_text_have_its_tokens(
    cache, tmp_path, monkeypatch, published, kept
):
    monkeypatch.setattr(tokens, "CACHED", 1 if kept else 2**40)
    monkeypatch.setattr(pieces, "PIECE", 2**20)
    (tmp_path / "texts").mkdir()
    for number, document in enumerate(DOCUMENTS):
        (tmp_path / "texts" / f"{number}.txt").write_text(document)
    (tmp_path / "one.txt").write_text("\n\n".join(DOCUMENTS))
    sources = [open_text(tmp_path / "texts"), open_text(tmp_path / "one.txt")]
    assert checksum([sources[0]]) == checksum([sources[1]])
    for name, tokenizer in published.items():
        whole = tokenizer.encode("\n\n".join(DOCUMENTS))
        for text in sources:
            [found] = token_arrays(tokenizer, [text], checksum([text]))
            np.testing.assert_array_equal(found, whole, err_msg=name)
            for path in cache.glob("*"):
                path.unlink()  # what one way of reading has kept would answer for the other


PARTS = [
    *(
        "the thing",
        " in",
        "\n",
        "\n\n",
        "  ",
        "\t",
        "a",
        "é",
        "e\u0301",
        "日本語",
        "。",
        "、\u3000",
    ),
    *("🦞", " 1234", ", ", "it's", "<s>", "<|end|>", "...", "\n    ", "ab" * 5, "\r\n", "(", " \n"),
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=80), st.integers(40, 99))
def test_a_text_of_several_pieces_has_the_tokens_of_the_whole(published, parts, piece):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", piece)
        for name, tokenizer in published.items():
            whole = tokenizer.encode(text)
            for size in (1, 7, 500):
                cut = Text(
                    lambda size=size: (text[i : i + size] for i in range(0, len(text), size))
                )
                [found] = token_arrays(tokenizer, [cut], checksum([cut]))
                np.testing.assert_array_equal(found, whole, err_msg=name)


def test_a_long_text_is_cut_and_not_held_whole(published, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 300)
    text = Text.of("\n\n".join(DOCUMENTS) * 20)
    for tokenizer in published.values():
        cut = list(text.cut(partial(tokens._ends_a_token, tokenizer)))
        assert "".join(piece for _, piece in cut) == text.read()
        assert max(len(piece) for _, piece in cut) <= 300
        for (_, earlier), (before, _) in itertools.pairwise(cut):
            assert earlier.endswith(before) or before.endswith(earlier)


def test_a_text_in_which_no_token_ends_is_refused(monkeypatch, published):
    monkeypatch.setattr(pieces, "LONGEST_WORD", 400)
    monkeypatch.setattr(pieces, "PIECE", 100)
    for length in (100, 400):
        [found] = token_arrays(
            published["gpt-2"], [text := Text.of("a" * length)], checksum([text])
        )
        np.testing.assert_array_equal(found, published["gpt-2"].encode("a" * length))
    text = Text.of("a" * 401)
    with pytest.raises(ValueError, match="got 400 characters among which no token surely ends"):
        token_arrays(published["gpt-2"], [text], checksum([text]))


def test_an_unknown_character_after_a_cut_is_said_with_its_place(monkeypatch):
    pytest.importorskip("tokenizers")
    from probattn.inference.pretrained.pretrained_tokenizer import PretrainedTokenizer

    monkeypatch.setattr(pieces, "PIECE", 11)
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, " ": 2, "\n": 3}, "merges": []}
    definition = {"model": model, "decoder": {"type": "Fuse"}, "added_tokens": []}
    for position in (5, 10, 11, 12, 40, 100, 107):
        line = "ab ba abab\n" * 10
        text = Text.of(line[:position] + "x" + line[position + 1 :])
        with pytest.raises(UnknownCharacter) as raises:
            token_arrays(PretrainedTokenizer(definition), [text], checksum([text]))
        assert raises.value.args == ("x", position, 1)


def test_byte_pairs_are_learnt_from_a_sample_of_all_parts_of_a_long_text(monkeypatch):
    pytest.importorskip("tokenizers")
    words = [f"{chr(97 + number) * 6} " for number in range(26)]
    text = "".join(word * 640 for word in words)
    sample = Text.of(text).sample(6400)
    assert sample.length == 6400
    assert set(sample.read()) == set(text)
    assert Text.of(text).sample(len(text)).read() == text
    monkeypatch.setattr(byte_pairs, "LEARNT_CHARACTERS", 6400)
    learnt = BytePairVocabulary.from_text(text, 600)
    assert {word.strip().encode() for word in words} <= {t.strip() for t in learnt.tokens}
    np.testing.assert_array_equal(learnt.decode(learnt.encode(text)), text)


MEASURED = """
import resource, sys
from probattn.text.corpora import DataConfig, load_corpus
from probattn.text.tokens import corpus_tokens, corpus_vocabulary
import jax, tokenizers
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
before = peak()
corpus = load_corpus(DataConfig(sys.argv[1]))
train, validation = corpus_tokens(corpus, corpus_vocabulary(corpus, "character"))
print(len(train) + len(validation), peak() - before)
"""


@pytest.mark.slow
def test_a_long_text_takes_no_memory_of_its_length(tmp_path):
    path = tmp_path / "long.txt"
    with path.open("w") as stream:
        for number in range(300):
            stream.write(f"{number}: {TRAIN * 300}")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    size = len(path.read_text())
    for most in (120, 60):  # MiB; the text has 200, and a copy of its tokens as many
        command = [sys.executable, "-c", MEASURED, str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        count, grown = done.stdout.split()
        assert int(count) == size
        assert float(grown) < most
