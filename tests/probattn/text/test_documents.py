"""Documents on disk as one text: which files, in what order, and what is read of them."""

import gzip
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probattn.text import documents
from probattn.text.corpora import DataConfig, DataError, load_corpus, read_text
from probattn.text.documents import SEPARATOR, decoded, documents_text, find_documents


@pytest.fixture
def folder(tmp_path):
    contents = {
        "texts/b.txt": b"second\n",
        "texts/a.txt": b"\xef\xbb\xbffirst\r\n",
        "texts/below/c.txt.gz": gzip.compress("thïrd\n".encode()),
        "texts/empty.txt": b"",
        "texts/.hidden": b"hidden",
        "texts/.git/object": b"\xff",
    }
    for name, data in contents.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "texts"


WHOLE = SEPARATOR.join(["first\n", "second\n", "thïrd\n"])


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["texts"], WHOLE),
        (["texts/*.txt"], SEPARATOR.join(["first\n", "second\n"])),
        (["texts/**/*.txt*"], WHOLE),
        (["texts/below/c.txt.gz", "texts/b.txt", "texts/a.txt"], WHOLE),
        (["texts/b.txt", "texts", "texts/[ab].txt"], WHOLE),
        (["texts/below/c.txt.gz"], "thïrd\n"),
    ],
    ids=["folder", "pattern", "pattern of folders", "files", "files named twice", "compressed"],
)
def test_documents_are_joined_in_sorted_order(folder, monkeypatch, sources, expected):
    monkeypatch.chdir(folder.parent)
    assert documents_text(find_documents(sources)).read() == expected
    source = sources[0] if len(sources) == 1 else tuple(sources)
    corpus = load_corpus(DataConfig(source=source))
    assert corpus.train + corpus.validation == expected
    assert "hidden" not in corpus.description


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["texts", "{}/texts"], ["texts/a.txt", "texts/b.txt"]),
        (["{}/texts", "texts"], ["{}/texts/a.txt", "{}/texts/b.txt"]),
        (["texts/../texts/b.txt", "texts"], ["texts/../texts/b.txt", "texts/a.txt"]),
        (["texts", "linked"], ["texts/a.txt", "texts/b.txt"]),
        (["linked/*", "texts"], ["linked/a.txt", "linked/b.txt"]),
        (["more"], ["more/1.txt", "more/4.txt"]),  # the first names of 2.txt and of a.txt
    ],
)
def test_a_file_is_one_document_whatever_names_lead_to_it(folder, monkeypatch, sources, names):
    home = folder.parent
    monkeypatch.chdir(home)
    for extra in ("empty.txt", "below/c.txt.gz"):
        (folder / extra).unlink()
    (home / "linked").symlink_to("texts")
    (home / "more").mkdir()
    for name, target in {"1.txt": "2.txt", "3.txt": "1.txt", "4.txt": "../texts/a.txt"}.items():
        (home / "more" / name).symlink_to(target)
    (home / "more" / "2.txt").write_text("more")
    found = find_documents([each.format(home) for each in sources])
    assert [str(path) for path in found] == [each.format(home) for each in names]


def test_a_corpus_says_what_it_is_of(folder):
    assert load_corpus(DataConfig(source=str(folder))).description == f"4 documents of {folder}"
    validated = load_corpus(DataConfig(f"{folder}/a.txt", validation=f"{folder}/[bc]*"))
    assert validated.validation == "second\n"
    pair = load_corpus(DataConfig((f"{folder}/a.txt", f"{folder}/b.txt")))
    assert (pair.name, pair.description) == (
        "2 documents",
        f"2 documents of {folder}/a.txt, {folder}/b.txt",
    )


@pytest.mark.parametrize("literal", ["a[1].txt", "what?.txt"])
def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path, literal):
    (tmp_path / literal).write_text("literal")
    (tmp_path / "a1.txt").write_text("matched")
    (tmp_path / "what1.txt").write_text("matched")
    assert read_text(tmp_path / literal) == "literal"


@given(
    st.lists(st.sampled_from(["\r", "\n", "\r\n", "\ufeff", "a", "é", "語", "🦞"]), min_size=1),
    st.integers(1, 5),
)
def test_where_a_file_is_cut_in_reading_changes_nothing(parts, size):
    text = "".join(parts)
    expected = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BYTES", size)
        assert decoded(text.encode(), "text") == expected


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_the_offset_of_a_bad_byte_does_not_depend_on_where_the_file_is_cut(monkeypatch, size):
    monkeypatch.setattr(documents, "_BYTES", size)
    for data, offset in ((b"ab\r\n\xc3\xa9\xe8\xaa", 6), (b"abc\xe8\xaaxyz", 3), (b"abc\xff", 3)):
        with pytest.raises(DataError, match=f"byte 0x{data[offset]:02x} at offset {offset};"):
            decoded(data, "text")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("bare", "'bare': got a folder without files"),
        ("texts/*.md", r"'texts/\*.md': no file matches"),
        ("texts/nowhere/b.txt", "no such file in .*expected a UTF-8 text file"),
        ("damaged.gz", "damaged.gz': cannot be read: "),
        ("cut.gz", "cut.gz': cannot be read: Compressed file ended"),
        ("odd", "odd/pipe': got a device or a pipe"),
        ("odd/link", "odd/link': no such file"),
        ("none", "'none/1': got an empty file|got empty files"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(folder, monkeypatch, source, reason):
    monkeypatch.chdir(folder.parent)
    for name in ("bare", "odd", "none"):
        os.mkdir(name)
    os.mkfifo("odd/pipe")
    os.symlink("nothing", "odd/link")
    for name in ("none/1", "none/2"):
        open(name, "w").close()
    whole = gzip.compress(b"a text" * 1000)
    (folder.parent / "cut.gz").write_bytes(whole[:-12])
    (folder.parent / "damaged.gz").write_bytes(whole[:10] + b"\xff" * 20)
    with pytest.raises(DataError, match=f"data.source: .*{reason}") as raises:
        load_corpus(DataConfig(source=source))
    assert "\n" not in str(raises.value)


@pytest.mark.parametrize("source", ["", b"texts/a.txt", [b"a.txt"], [3]])
def test_a_text_is_named_by_a_path_and_never_by_nothing(folder, monkeypatch, source):
    monkeypatch.chdir(folder)  # an empty name would stand for all files that lie here
    with pytest.raises(DataError, match=r"expected the path of a UTF-8 text file, as a str or"):
        documents.find_documents(source)


def test_a_small_file_that_holds_a_large_text_is_not_read_to_its_end(tmp_path, monkeypatch):
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"0" * 10_000_000))
    monkeypatch.setattr(documents, "LARGEST", 3_000_000)
    monkeypatch.setattr(documents, "_BYTES", 1_000_000)
    with pytest.raises(DataError, match="has 4000000 bytes, expected at most 3000000"):
        read_text(tmp_path / "bomb.gz")
