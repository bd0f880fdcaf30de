"""Corpora: sources, splits, checksums, and (from `download`) a download that trusts nothing."""

import dataclasses
import functools
import hashlib
import http.server
import io
import os
import sys
import threading
import zipfile

import pytest

from probattn.text import corpora, download
from probattn.text.corpora import Corpus, DataConfig, DataError, load_corpus, read_text

TRAIN = "the training text é\n".encode() * 20
VALID = b"the validation text\n" * 3
NAMES = ["wiki.train.raw", "wiki.valid.raw"]
PUBLISHED = corpora.WIKITEXT_2


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def zipped(members):
    """The same bytes in every process: all files are of one date."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def members(train=TRAIN, valid=VALID, **more):
    folder = "wikitext-2-raw"
    return {f"{folder}/{NAMES[0]}": train, f"{folder}/{NAMES[1]}": valid, **more}


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch, tmp_path):
    """Neither the user's cache nor the network takes part in a test."""
    monkeypatch.delenv("PROBATTN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("NO_PROXY", "*")
    closed = dataclasses.replace(PUBLISHED, url="http://127.0.0.1:1/closed.zip")
    monkeypatch.setattr(corpora, "WIKITEXT_2", closed)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers every request alike, and keeps its headers."""

    def __init__(self, answer, declared, requests, *rest):
        self.answer, self.declared, self.requests = answer, declared, requests
        super().__init__(*rest)

    def do_GET(self):
        self.requests.append(self.headers)
        self.send_response(200)
        self.send_header("Content-Length", str(self.declared))
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Pin the small archive `members()`, and have a server on this machine answer with bytes."""
    servers = []

    def serve(answer, *, pinned=None, declared=None):
        requests = []
        declared = len(answer) if declared is None else declared
        handler = functools.partial(Handler, answer, declared, requests)
        server = http.server.HTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        archive = dataclasses.replace(
            PUBLISHED,
            url=f"http://127.0.0.1:{server.server_port}/archive.zip",
            sha256=pinned or sha256(zipped(members())),
            files=tuple((n, len(d), sha256(d)) for n, d in zip(NAMES, (TRAIN, VALID), strict=True)),
        )
        monkeypatch.setattr(corpora, "WIKITEXT_2", archive)
        return requests

    yield serve
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def files_under(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def error_line(raises):
    message = str(raises.value)
    assert "\n" not in message
    return message


# Configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", ""),
        ("source", 3),
        ("source", ()),
        ("source", ("a", "")),
        ("source", ("a", 3)),
        ("validation", ""),
        ("validation", 3),
        *(("validation_fraction", f) for f in (0.0, 1.0, -0.1, 1.5, float("nan"), "0.1", 1, True)),
        *(("tokenizer", t) for t in ("", "word", "bpe", "bpe:", "bpe:256", "bpe:1e3", "bpe:-5")),
        *(("tokenizer", t) for t in ("bpe:262145", "bpe: 512", "bpe:512\n", "bpe:٥١٢", None)),
    ],
)
def test_config_names_the_field_and_what_it_got(field, value):
    with pytest.raises(ValueError, match=f"data.{field}: got .*expected") as raises:
        DataConfig(**{field: value})
    assert repr(value) in error_line(raises)


def test_a_named_source_stands_alone(tmp_path, monkeypatch):
    assert DataConfig(source=("pydoc",)) == DataConfig(source="pydoc")
    for source in (("pydoc", "README.md"), ("README.md", "pydoc"), ("a", "wikitext-2", "b")):
        with pytest.raises(
            ValueError, match=r"data.source: got '(pydoc|wikitext-2)' among "
        ) as raises:
            DataConfig(source=source)
        [name] = set(source) & {"pydoc", "wikitext-2"}
        assert f"a file of that name is './{name}'" in error_line(raises)
    monkeypatch.chdir(tmp_path)
    for name in ("pydoc", "other"):
        write(tmp_path / name, name.encode())
    corpus = load_corpus(DataConfig(source=("./pydoc", "other")))
    assert corpus.train + corpus.validation == "other\n\npydoc"


@pytest.mark.parametrize("tokenizer", ["character", "bpe:257", "bpe:262144"])
def test_config_accepts_tokenizers(tokenizer):
    assert DataConfig(tokenizer=tokenizer).tokenizer == tokenizer


# Files


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain\n", "plain\n"),
        (b"\xef\xbb\xbfmarked", "marked"),
        (b"\xef\xbb\xbf\xef\xbb\xbftwice", "\ufefftwice"),
        (b"a\r\nb\rc\n\r\n", "a\nb\nc\n\n"),
        ("NUL \0 emoji 🦞 e\u0301 \u2028 \x0b".encode(), "NUL \0 emoji 🦞 e\u0301 \u2028 \x0b"),
    ],
)
def test_read_text_drops_the_mark_and_unifies_line_ends_only(tmp_path, data, text):
    path = write(tmp_path / "text", data)
    assert read_text(path) == text
    assert read_text(str(path)) == text


def test_read_text_expands_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "text", b"at home")
    assert read_text("~/text") == "at home"


def test_read_text_of_an_unknown_users_home():
    with pytest.raises(DataError, match=r"'~no.such.user/text': cannot be read"):
        read_text("~no.such.user/text")


@pytest.mark.parametrize(
    ("data", "offset", "byte"),
    [
        (b"abc\xff", 3, "ff"),
        (b"\xef\xbb\xbfab\x80", 5, "80"),  # the offset counts the mark: it is of the file
        ("text".encode("utf-16"), 0, "ff"),
        (b"\xc3", 0, "c3"),
        (b"ab\xed\xa0\x80", 2, "ed"),  # a surrogate written as if it were a character
    ],
)
def test_read_text_gives_the_offset_of_what_is_not_utf8(tmp_path, data, offset, byte):
    path = write(tmp_path / "text", data)
    with pytest.raises(DataError, match=f"not UTF-8: byte 0x{byte} at offset {offset};") as raises:
        read_text(path)
    assert str(path) in error_line(raises)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "no such file"),
        ("folder", "got a folder without files"),
        ("empty", "got an empty file"),
        ("mark", "got an empty file"),
        ("nul\0", "cannot be read"),
        ("long" * 500, "cannot be read"),
        ("empty/below", "cannot be read"),
        ("two\nlines", "no such file"),
    ],
)
def test_read_text_refuses_in_one_line_that_names_the_path(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "empty", b"")
    write(tmp_path / "mark", b"\xef\xbb\xbf")
    path = str(tmp_path / name)
    with pytest.raises(DataError, match=reason) as raises:
        read_text(path)
    assert repr(path) in error_line(raises)


# Splits and checksums


def test_pydoc_is_the_language_reference_of_this_python():
    from pydoc_data.topics import topics

    corpus = load_corpus(DataConfig())
    text = corpus.train + corpus.validation
    first, last = min(topics), max(topics)
    assert text.startswith(topics[first])
    assert text.endswith(topics[last])
    assert len(text) == sum(map(len, topics.values())) + len(topics) - 1
    assert 400_000 < len(text) < 600_000
    assert len(corpus.validation) == round(len(text) * 0.1)
    assert corpus.name == "pydoc"
    assert "Python 3." in corpus.description
    assert corpus == load_corpus(DataConfig())
    assert len(repr(corpus)) < 500  # the text itself is not printed


def test_pydoc_does_not_depend_on_the_order_of_the_topics(monkeypatch):
    monkeypatch.setattr("pydoc_data.topics.topics", {"b": "second\n", "a": "first\n"})
    corpus = load_corpus(DataConfig())
    assert corpus.train + corpus.validation == "first\n\nsecond\n"


def test_pydoc_says_what_to_do_where_python_lacks_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"pydoc: .*give the path of a UTF-8 text file"):
        load_corpus(DataConfig())


@pytest.mark.parametrize(
    ("length", "fraction", "held_out"),
    [(10, 0.1, 1), (10, 0.28, 3), (1000, 0.333, 333), (2, 0.01, 1), (2, 0.99, 1), (5, 0.999, 4)],
)
def test_the_end_of_a_file_is_held_out(tmp_path, length, fraction, held_out):
    text = "".join(chr(0x4E00 + i) for i in range(length))
    path = write(tmp_path / "book.txt", text.encode())
    corpus = load_corpus(DataConfig(source=str(path), validation_fraction=fraction))
    assert corpus.train == text[: length - held_out]
    assert corpus.validation == text[length - held_out :]
    assert corpus.name == "book.txt"
    assert corpus.description == f"file {path}"


def test_a_second_file_is_the_validation_text(tmp_path):
    source, second = write(tmp_path / "a", b"a"), write(tmp_path / "b", b"\xef\xbb\xbfb\r\n")
    corpus = load_corpus(DataConfig(source=str(source), validation=str(second)))
    assert (corpus.train, corpus.validation) == ("a", "b\n")
    assert str(second) in corpus.description


def test_checksum_is_of_both_parts_and_of_where_they_are_divided():
    assert Corpus("x", "ab", "cé", "").sha256 == sha256(b"ab\xffc\xc3\xa9")
    parts = [("ab", "c"), ("a", "bc"), ("a\0b", "c"), ("a", "b\0c"), ("abc", "c")]
    assert len({Corpus("x", *part, "").sha256 for part in parts}) == len(parts)


@pytest.mark.parametrize(
    ("train", "validation", "reason"),
    [
        ("", "b", "empty train"),
        ("a", "", "empty validation"),
        ("a", "b\ud800", r"surrogate '\\ud800' at position 1"),
    ],
)
def test_corpus_refuses_texts_that_have_no_bytes(train, validation, reason):
    with pytest.raises(DataError, match=reason):
        Corpus("x", train, validation, "")


def test_load_corpus_names_the_field_of_a_bad_file(tmp_path):
    good, short = write(tmp_path / "good", b"good"), write(tmp_path / "short", b"s")
    with pytest.raises(DataError, match=r"data.source: 'wikitext2': no such file.*pydoc or wikit"):
        load_corpus(DataConfig(source="wikitext2"))
    with pytest.raises(DataError, match=r"data.validation: '/no/file': no such file"):
        load_corpus(DataConfig(source=str(good), validation="/no/file"))
    with pytest.raises(DataError, match="got 1 character, expected two or more"):
        load_corpus(DataConfig(source=str(short)))


# WikiText-2


def test_the_pinned_archive_is_the_published_one():
    # The figures recorded by HuggingFace datasets and by users of the archive, not by this package.
    archive = PUBLISHED
    assert archive.url.startswith("https://")
    assert archive.sha256.startswith("ef7edb56")
    assert [size for _, size, _ in archive.files] == [10_940_747, 1_146_846]
    assert {len(digest) for _, _, digest in archive.files} == {len(archive.sha256)} == {64}


def test_wikitext_is_downloaded_once_into_the_users_cache(serve, tmp_path):
    requests = serve(zipped(members()))
    config = DataConfig(source="wikitext-2")
    corpus = load_corpus(config)
    assert (corpus.train, corpus.validation) == (TRAIN.decode(), VALID.decode())
    assert corpus == load_corpus(config)
    assert files_under(tmp_path) == [f"xdg/probattn/wikitext-2-raw/{name}" for name in NAMES]
    [headers] = requests
    assert headers["User-Agent"] == "probattn"  # the host refuses those of libraries


def test_wikitext_with_another_validation_file(serve, tmp_path):
    serve(zipped(members()))
    other = write(tmp_path / "other", b"other")
    corpus = load_corpus(DataConfig(source="wikitext-2", validation=str(other)))
    assert (corpus.train, corpus.validation) == (TRAIN.decode(), "other")


@pytest.mark.parametrize("folder", ["", "wikitext-2-raw"])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_wikitext_files_at_hand_are_used_without_a_network(
    serve, tmp_path, monkeypatch, folder, by
):
    requests = serve(b"")
    data = tmp_path / "data"
    for name, content in zip(NAMES, (TRAIN, VALID), strict=True):
        write(data / folder / name, content)
    if by == "environment":
        monkeypatch.setenv("PROBATTN_DATA", str(data))
    corpus = load_corpus(
        DataConfig(source="wikitext-2"), cache_dir=data if by == "argument" else None
    )
    assert (corpus.train, corpus.validation) == (TRAIN.decode(), VALID.decode())
    assert not requests


def test_probattn_data_is_never_written_to(serve, tmp_path, monkeypatch):
    requests = serve(zipped(members()))
    write(tmp_path / "data" / NAMES[0], TRAIN)
    monkeypatch.setenv("PROBATTN_DATA", str(tmp_path / "data"))
    expected = "PROBATTN_DATA=.* holds no wiki.train.raw and wiki.valid.raw; put them there"
    with pytest.raises(DataError, match=expected):
        load_corpus(DataConfig(source="wikitext-2"))
    assert files_under(tmp_path) == ["data/wiki.train.raw"]
    assert not requests
    load_corpus(DataConfig(source="wikitext-2"), cache_dir=tmp_path / "cache")  # goes first
    assert len(requests) == 1


def test_a_damaged_copy_is_refused(serve, tmp_path):
    serve(zipped(members()))
    config = DataConfig(source="wikitext-2")
    load_corpus(config, cache_dir=tmp_path)
    damaged = write(tmp_path / "wikitext-2-raw" / NAMES[1], VALID[:-1] + b"!")
    with pytest.raises(DataError, match=r"wiki.valid.raw.* SHA-256 .*expected .*delete a damaged"):
        load_corpus(config, cache_dir=tmp_path)
    damaged.unlink()
    assert load_corpus(config, cache_dir=tmp_path).validation == VALID.decode()


def test_a_copy_that_cannot_be_read_is_reported(serve, tmp_path, monkeypatch):
    serve(zipped(members()))
    config = DataConfig(source="wikitext-2")
    load_corpus(config, cache_dir=tmp_path)

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(download.Path, "open", refuse)
    with pytest.raises(DataError, match=r"wiki.train.raw': cannot be read: .*Permission") as raises:
        load_corpus(config, cache_dir=tmp_path)
    error_line(raises)


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"cannot download http://.*[Rr]efused") as raises:
        load_corpus(DataConfig(source="wikitext-2"))
    message = error_line(raises)
    for hint in (*NAMES, str(tmp_path / "xdg" / "probattn"), "PROBATTN_DATA", "data.source"):
        assert hint in message
    assert files_under(tmp_path) == []


def test_without_pooch_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pooch", None)
    expected = r"wikitext-2: pooch is not installed: .*pip install 'probattn\[download\]', or put"
    with pytest.raises(DataError, match=expected) as raises:
        load_corpus(DataConfig(source="wikitext-2"))
    message = error_line(raises)
    for hint in (*NAMES, str(tmp_path / "xdg" / "probattn"), "PROBATTN_DATA", "data.source"):
        assert hint in message
    assert list(tmp_path.iterdir()) == []


def test_files_at_hand_need_no_pooch(serve, tmp_path, monkeypatch):
    serve(zipped(members()))
    load_corpus(DataConfig(source="wikitext-2"), cache_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "pooch", None)
    corpus = load_corpus(DataConfig(source="wikitext-2"), cache_dir=tmp_path)
    assert corpus.validation == VALID.decode()


def test_a_connection_that_breaks_is_reported(serve, tmp_path):
    data = zipped(members())
    serve(data[:100], declared=len(data))
    with pytest.raises(DataError, match="cannot download http://") as raises:
        load_corpus(DataConfig(source="wikitext-2"))
    error_line(raises)
    assert files_under(tmp_path) == []


def test_a_copy_that_is_too_large_is_not_read_to_its_end(serve, tmp_path):
    serve(zipped(members()))
    with write(tmp_path / NAMES[0], b"").open("r+b") as file:
        file.truncate(2**40)  # of which nothing is on disk
    write(tmp_path / NAMES[1], VALID)
    with pytest.raises(DataError, match=r"wiki.train.raw': got more than the expected"):
        load_corpus(DataConfig(source="wikitext-2"), cache_dir=tmp_path)


@pytest.mark.parametrize("field", ["source", "validation"])
def test_a_text_that_has_no_end_is_not_read(tmp_path, field):
    """A run of somebody else's may name it."""
    write(tmp_path / "text", b"a text")
    os.mkfifo(tmp_path / "pipe")
    with write(tmp_path / "large", b"").open("r+b") as file:
        file.truncate(2**31)
    reasons = {
        "/dev/zero": "got a device or a pipe, expected a UTF-8 text file",
        str(tmp_path / "pipe"): "got a device or a pipe, expected a UTF-8 text file",
        str(tmp_path / "large"): "has 2147483648 bytes, expected at most 2147483647",
    }
    for path, reason in reasons.items():
        named = {"source": str(tmp_path / "text"), field: path}
        with pytest.raises(DataError, match=f"data.{field}: '{path}': {reason}"):
            load_corpus(DataConfig(**named))


def test_relative_xdg_cache_is_ignored_and_a_home_is_needed(serve, tmp_path, monkeypatch):
    serve(zipped(members()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_corpus(DataConfig(source="wikitext-2"))
    assert files_under(tmp_path)[0] == "home/.cache/probattn/wikitext-2-raw/wiki.train.raw"

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(download.Path, "home", homeless)
    with pytest.raises(DataError, match=r"no home directory .*XDG_CACHE_HOME"):
        load_corpus(DataConfig(source="wikitext-2"))


SWAPPED = zipped(members(valid=VALID.upper()))
LONGER = zipped(members(valid=VALID + b"!"))
MISSING = zipped({"wikitext-2-raw/wiki.train.raw": TRAIN})


@pytest.mark.parametrize(
    ("answer", "pinned", "reason"),
    [
        (SWAPPED, None, "cannot download .* hash .* does not match"),
        (zipped(members())[:-1], None, "hash .* does not match"),
        (b"", None, "hash .* does not match"),
        (zipped(members()) + b"\0", None, "hash .* does not match"),
        # The archive is the one that is pinned; its files are not.
        (SWAPPED, sha256(SWAPPED), "wiki.valid.raw.* SHA-256"),
        (LONGER, sha256(LONGER), "wiki.valid.raw.* more than the expected"),
        (MISSING, sha256(MISSING), "wiki.valid.raw.* cannot be read"),
        (b"no zip", sha256(b"no zip"), "cannot download .*not a zip file"),
    ],
    ids=[
        "another archive",
        "cut",
        "empty",
        "a byte more",
        "another file in it",
        "a longer file in it",
        "a file missing in it",
        "no zip",
    ],
)
def test_a_bad_download_is_refused_and_leaves_nothing(serve, tmp_path, answer, pinned, reason):
    serve(answer, pinned=pinned)
    with pytest.raises(DataError, match=reason) as raises:
        load_corpus(DataConfig(source="wikitext-2"), cache_dir=tmp_path / "cache")
    error_line(raises)
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("other", ["wikitext-2-raw/wiki.test.raw", "../out", "/out", "a\\..\\out"])
def test_other_members_of_the_archive_are_not_unpacked(serve, tmp_path, other):
    data = zipped({other: b"out", **members()})
    serve(data, pinned=sha256(data))
    load_corpus(DataConfig(source="wikitext-2"), cache_dir=tmp_path / "cache")
    assert files_under(tmp_path) == [f"cache/wikitext-2-raw/{name}" for name in NAMES]


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_no_partial_file(serve, tmp_path, monkeypatch, failure):
    serve(zipped(members()))
    replace = download.os.replace

    def replace_first_only(source, target):
        if target.name == NAMES[1]:
            raise failure
        replace(source, target)

    monkeypatch.setattr(download.os, "replace", replace_first_only)
    expected = DataError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        load_corpus(DataConfig(source="wikitext-2"), cache_dir=tmp_path)
    assert files_under(tmp_path) == ["wikitext-2-raw/wiki.train.raw"]  # whole; checked at next load
    monkeypatch.setattr(download.os, "replace", replace)
    assert load_corpus(DataConfig(source="wikitext-2"), cache_dir=tmp_path).train == TRAIN.decode()


def test_a_cache_that_cannot_be_written_is_reported(serve, tmp_path):
    serve(zipped(members()))
    blocker = write(tmp_path / "file", b"")
    expected = r"cannot download http://.* into .*/file/wikitext-2-raw': .*PROBATTN_DATA"
    with pytest.raises(DataError, match=expected):
        load_corpus(DataConfig(source="wikitext-2"), cache_dir=blocker)
