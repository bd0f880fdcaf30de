"""Tokens of a text as they are shown, part by part."""

import numpy as np
import pytest

from probattn.text import displayed
from probattn.text.displayed import DisplayedTokens
from probattn.text.vocabulary import BytePairVocabulary

VOCABULARY = BytePairVocabulary(())  # its tokens are the bytes
CONTENT = (
    "a\n é 🦞🦞 ü \N{REPLACEMENT CHARACTER}b".encode() + b"\xf0\x9f\xa6" + "🦞".encode() + b"\xa6z"
)
IDS = np.frombuffer(CONTENT, np.uint8)


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setattr(displayed, "_TOGETHER", 3)
    return DisplayedTokens(VOCABULARY, IDS)


def test_every_part_shows_what_the_whole_text_shows(shown):
    """Also where a part begins or ends within a character, or within one that is cut."""
    expected = VOCABULARY.display(IDS)
    assert list(shown) == expected
    assert len(shown) == len(expected)
    for start in range(len(IDS)):
        assert shown[start] == expected[start]
        for stop in range(len(IDS) + 2):
            assert shown[start:stop] == expected[start:stop]
    assert shown[-1] == expected[-1]
    assert shown[-3:2:-2] == expected[-3:2:-2]
    with pytest.raises(IndexError):
        shown[len(IDS)]


def test_it_equals_a_list_of_the_same_texts(shown):
    expected = VOCABULARY.display(IDS)
    assert shown == expected
    assert expected == shown
    assert shown != expected[1:]
    assert shown != [*expected[:-1], "other"]
    assert shown != 3
