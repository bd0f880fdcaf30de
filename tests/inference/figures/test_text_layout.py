"""Where the characters of a text are drawn."""

import numpy as np

from probattn.inference.figures.text_layout import lay_out, replace_missing_glyphs


def layout(tokens, columns=10, max_rows=9, max_characters=999):
    return lay_out(
        tokens,
        columns=columns,
        max_rows=max_rows,
        max_characters=max_characters,
        has_glyph=lambda character: character.isascii(),
    )


def placed(tokens, **options):
    return [(p.token, p.row, p.column, p.text) for p in layout(tokens, **options).pieces]


def test_rows_break_between_words():
    assert placed(list("ab cd")) == [(i, 0, i, c) for i, c in enumerate("ab cd")]
    assert placed(["abc defgh i"]) == [(0, 0, 0, "abc defgh "), (0, 1, 0, "i")]
    assert placed(["one two th", "ree"]) == [
        (0, 0, 0, "one two "),
        (0, 1, 0, "th"),
        (1, 1, 2, "ree"),
    ]


def test_a_word_longer_than_a_row_is_broken_and_newlines_break():
    assert placed(["x", "y" * 14]) == [(0, 0, 0, "x"), (1, 0, 1, "y" * 9), (1, 1, 0, "y" * 5)]
    assert placed(["a\n\nb"]) == [(0, 0, 0, "a↵"), (0, 1, 0, "↵"), (0, 2, 0, "b")]


def test_every_character_has_a_place_of_its_own():
    text = "".join(np.random.default_rng(2).choice(list("ab \n"), 400))
    found = layout([text[i : i + 3] for i in range(0, 400, 3)], max_rows=999)
    places = [(p.row, p.column + i) for p in found.pieces for i in range(len(p.text))]
    assert places == sorted(set(places))
    assert max(column for _, column in places) < 10
    assert "".join(p.text for p in found.pieces).replace("↵", "\n") == text
    assert (found.shown, found.total, found.rows) == (400, 400, places[-1][0] + 1)


def test_legible_keeps_the_length():
    assert replace_missing_glyphs("a\tb\nc\x07é\u3000", str.isascii) == "a⇥b↵c\ufffd\ufffd "
