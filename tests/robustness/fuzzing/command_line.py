"""Target: the command line, up to where a command would begin its work."""

import contextlib
import functools
import io
import itertools
import re
from pathlib import Path

from hypothesis import strategies as st

from probattn.inference.cli import main
from tests.robustness.fuzzing.material import any_text, floats, integers
from tests.robustness.fuzzing.target import Target, require

_OUT = ["--out", "out"]
_NEEDED = {
    **dict.fromkeys(("fit", "sample", "margins", "sensitivity", "compare"), _OUT),
    "evaluate": [],
    "generate": ["--prompt", "a"],
}
_LONG = ("figures", "demo")  # which need nothing to begin
# They would wait for processes that nobody starts.
_LEFT_OUT = {"--coordinator", "--num-processes", "--process-id"}
_WORDS = [
    *("true", "None", "map", "nuts", "gaussian", "latent", "data=2", "data=-1,fsdp=x", "0x10"),
    *("--", "-1", "", "\x1b[2J", "[/bold]", "a=b", "1e999", "9" * 5000, "x" * 300),
    *("empty", "file", "link", "absent/run", "file/run", "/dev/full"),
]


def command_line(folder: Path) -> Target:
    """Flags of the command and of others, values of any kind; the text or the run is absent.

    Each must end with status 0 after --help, else with 1 or 2 and one printable line on standard
    error, and leave nothing behind.
    """
    place = folder / "work"
    (place / "empty").mkdir(parents=True)
    (place / "file").write_text("a text", encoding="utf-8")
    (place / "link").symlink_to("link")
    before = sorted(place.rglob("*"))

    def check(arguments: list[str]) -> str:
        shown, told = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(place),
            contextlib.redirect_stdout(shown),
            contextlib.redirect_stderr(told),
        ):
            try:
                status = main(arguments)
            except SystemExit as stop:
                status = int(stop.code or 0)
        require(sorted(place.rglob("*")) == before, "something was left behind")
        if status == 0:
            require({"--help", "-h"} & set(arguments), "it did something")
            require("usage: probattn" in shown.getvalue(), "the help says nothing")
            return "help"
        message = told.getvalue()
        require(status in (1, 2), f"the status is {status}")
        require(re.fullmatch(r"probattn: error: .+\n", message), f"the message is {message!r}")
        require(message[:-1].isprintable(), f"the message steers a terminal: {message!r}")
        return "refused by the parser" if "; see probattn --help" in message else "refused"

    return Target("command_line", _inputs(), check)


def _inputs() -> st.SearchStrategy[list[str]]:
    every = sorted({flag for command in (*_NEEDED, *_LONG) for flag in _flags(command)})
    likely = st.sampled_from(["1", "2", "0.5", "ce", "full", "free", "file"])
    values = st.one_of(
        likely,
        likely,
        st.sampled_from(_WORDS),
        integers.filter(lambda number: abs(number) < 10**4000).map(str),
        floats.map(repr),
        any_text.filter(lambda text: "\0" not in text),
    )

    def of(command: str) -> st.SearchStrategy[list[str]]:
        flags = st.one_of(*[st.sampled_from(_flags(command))] * 6, st.sampled_from(every))
        pair = st.tuples(flags, values)
        part = st.one_of(pair, pair, pair, st.tuples(flags), st.tuples(values))
        if command in _LONG:
            last = ["--no-such-flag"]
        elif command in ("fit", "sample"):
            last = ["--data=absent", "--data=empty", "--data=link"]
        else:
            last = ["absent", "empty", "file", "link"]
        needed = st.sampled_from([_NEEDED.get(command, [])] * 9 + [[]])
        parts = st.lists(part, max_size=3).map(itertools.chain.from_iterable)
        return st.builds(
            lambda needed, parts, last: [command, *needed, *parts, last],
            *(needed, parts, st.sampled_from(last)),
        )

    known = st.sampled_from([*_NEEDED, *_LONG]).flatmap(of)
    unknown = st.lists(values, max_size=3)
    return st.one_of(*[known] * 9, unknown)


@functools.cache
def _flags(command: str) -> list[str]:
    """As the help names them."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([command, "--help"])
    found = set(re.findall(r"--[a-z][a-z0-9.-]*", shown.getvalue())) | {"--help"}
    return sorted(found - _LEFT_OUT)
