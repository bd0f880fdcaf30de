"""A target: inputs, and a check that each ends in a right answer or a documented error."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis.strategies import SearchStrategy


class Finding(AssertionError):  # noqa: N818 (it is what a fuzzer finds)
    """An input that ended in neither a right answer nor a documented error."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        name: of the target.
        inputs: strategy of its inputs; Hypothesis and the coverage-guided fuzzer draw from it.
        check: of one input: it returns the name of the outcome ("accepted", or that of a documented
            error), and raises at a finding, be it what the code raised or a `Finding`.
    """

    name: str
    inputs: SearchStrategy[Any]
    check: Callable[[Any], str]


def require(condition: object, message: str) -> None:
    """Raise a finding unless the condition holds."""
    if not condition:
        raise Finding(message)


def refused(error: BaseException, *, named: str = "") -> str:
    """Name of a documented error, whose message must be one line and begin with what it names."""
    message = str(error)
    require(message.strip(), f"{type(error).__name__} says nothing")
    require(len(message.splitlines()) == 1, f"the message is not one line: {message!r}")
    require(message.startswith(named), f"the message does not begin with {named!r}: {message!r}")
    return type(error).__name__
