"""Texts as arrays of tokens: their values and types, and what is kept in the user's cache."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from probattn.text import byte_pairs, pieces, tokens
from probattn.text.byte_pairs import BytePairVocabulary
from probattn.text.corpora import Corpus, DataConfig, load_corpus
from probattn.text.download import DataError
from probattn.text.pieces import Text, checksum
from probattn.text.tokens import corpus_tokens, corpus_vocabulary, token_arrays
from probattn.text.vocabulary import CharacterVocabulary, UnknownCharacter, build_vocabulary

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
    assert len(files(cache, ".json")) == 2 * 2


@pytest.mark.parametrize("left", [0, 40, 200])
def test_a_file_that_is_cut_is_made_again(cache, corpus, left):
    vocabulary = corpus_vocabulary(corpus, "character")
    corpus_tokens(corpus, vocabulary)
    for path in (*files(cache, ".npy"), *files(cache, ".json")):
        os.truncate(path, left)
    assert corpus_vocabulary(corpus, "character") == vocabulary
    train, validation = corpus_tokens(corpus, vocabulary)
    np.testing.assert_array_equal(train, vocabulary.encode(TRAIN))
    np.testing.assert_array_equal(validation, vocabulary.encode(VALIDATION))


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
