"""What a page shows of a text, and the one file that shows it and asks for nothing else."""

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from probattn.inference.pages.colours import ANCHORS, SUPPORT, UNKNOWN
from probattn.inference.pages.numbers import codes, planes

MOST_TOKENS = 200_000
"""Tokens of the longest text that a page shows."""

_MOST_BYTES = 4_000_000  # of a page with past tokens
_PROVED = "<details><summary>What is proved of all texts</summary>{}</details>"
_SCRIPTS = ("data", "tokens", "colours", "text", "details", "overview", "controls")

QUANTITIES = {
    "margin": ("margin", "margin (sigma_min)"),
    "low": ("5 %", "margin that 5 % of the draws are below"),
    "high": ("95 %", "margin that 95 % of the draws are below"),
    "support_probability": ("P(support)", "probability of being the support token"),
    "certified_probability": ("P(proved)", "probability that the certificate is below 1"),
    "embedding_margin": ("embedding margin", "first-order embedding margin"),
    "certificate": ("certificate", "certificate rho (below 1: proved)"),
    "radius": ("radius", "certified radius (in units of the input's RMS)"),
    "loss": ("loss", "loss of the next token (nats)"),
    "noisy_loss": ("noisy loss", "loss of the next token under noise (nats)"),
    "increase": ("increase", "increase of the loss by noise (nats)"),
}
"""What values of a token may be called, and what a page calls them: in short, and in full."""

LARGE_MATTER = {"support_probability", "certificate", "loss", "noisy_loss", "increase"}
"""Those whose large values are looked for; of all others it is the small ones."""


@dataclass(frozen=True)
class Past:
    """The past tokens that count most, for each of N tokens.

    Attributes:
        behind: how many tokens before it each lies, most important first, (N, k); 0 for none.
        share: their shares in a sum over the whole past, (N, k).
    """

    behind: Int[np.ndarray, "N k"]
    share: Float[np.ndarray, "N k"]


@dataclass(frozen=True)
class Series:
    """Values of one attention stage of one run at N tokens.

    Attributes:
        run: label of the run.
        stage: label of the stage.
        values: by name in QUANTITIES, (N,).
        support: which tokens are outlined, (N,).
        covariance: past tokens by their shares in the covariance, if they were computed.
        attention: past tokens by attention, likewise.
    """

    run: str
    stage: str
    values: Mapping[str, Float[np.ndarray, " N"]]
    support: Bool[np.ndarray, " N"]
    covariance: Past | None = None
    attention: Past | None = None


@dataclass(frozen=True)
class Summary:
    """A table above the text.

    Attributes:
        columns: names of the columns.
        rows: cells, as they are shown.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Page:
    """What a page shows of N tokens.

    Attributes:
        title: name of the text.
        tokens: what is shown of each token, N strings; the empty text where a token only goes on
            with the character of the one before.
        index: number of each token in the text, (N,).
        window: number of its window, (N,).
        position: its position there, (N,).
        starts: which of the N tokens begin a window.
        breaks: which of them do not go on with the text of the token before.
        series: values by run and stage, at least one.
        of_runs: values that a run has whatever the stage is, by label of the run and name, (N,).
        notes: sentences under the title.
        proved: sentences on what is proved of all texts.
        summary: a table under them.
        outlined: what an outline means.
        sequences: whether the windows are sequences that do not go on with each other, so that
            `index` counts what is shown and is no place in a text.
    """

    title: str
    tokens: Sequence[str]
    index: Int[np.ndarray, " N"]
    window: Int[np.ndarray, " N"]
    position: Int[np.ndarray, " N"]
    starts: Sequence[int]
    series: Sequence[Series]
    breaks: Sequence[int] = ()
    of_runs: Mapping[str, Mapping[str, Float[np.ndarray, " N"]]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    proved: Sequence[str] = ()
    summary: Summary | None = None
    outlined: str = "support token of its window"
    sequences: bool = False


def check_length(name: str, tokens: int) -> None:
    """Refuse a text that is too long for a page.

    Raises:
        ValueError: if it has more than MOST_TOKENS tokens.
    """
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"{name}: has {tokens:,} tokens: a page shows at most {MOST_TOKENS:,}; give a shorter "
            "text"
        )


def page_html(page: Page) -> str:
    """Return a page as HTML, in ASCII: its style, script and data are in it.

    Numbers have three significant digits, and shares of the past whole percents. So many past
    tokens of each token are kept as let the page have at most four million bytes.

    Raises:
        ValueError: if the text has no tokens, or more than MOST_TOKENS, or there are no series.
    """
    if not len(page.tokens):
        raise ValueError(f"{page.title}: has no tokens: a page shows at least one")
    check_length(page.title, len(page.tokens))
    if not page.series:
        raise ValueError(
            f"{page.title}: has no margins: a page shows values of at least one attention stage"
        )
    here = resources.files(__package__)
    script = "\n".join((here / f"{name}.js").read_text("utf-8") for name in _SCRIPTS)
    script = f'(async () => {{\n"use strict";\n{script}\n}})();\n'
    style = (here / "page.css").read_text("utf-8")
    skeleton = (here / "page.html").read_text("utf-8")
    content, values = _description(page)
    parts = {
        "policy": _policy(script, style),
        "title": html.escape(page.title),
        "style": style,
        "notes": _paragraphs(page.notes),
        "proved": _PROVED.format(_paragraphs(page.proved)) if page.proved else "",
        "summary": _table(page.summary) if page.summary else "",
        "part": _part(page),
        "script": script,
    }
    blobs, room = [_blob(values)], _MOST_BYTES - len(skeleton) - sum(map(len, parts.values()))
    room -= len(blobs[0]) + len(_data(content | {"ranks": 0, "blobs": []}))
    for ranked in _ranks(page, content):
        blob = _blob(ranked)
        room -= len(blob) + 3  # with its quotes and comma
        if room < 0:
            break
        blobs.append(blob)
    parts["data"] = _data(content | {"ranks": len(blobs) - 1, "blobs": blobs})
    # In one pass, so that no part is looked through for the names of others.
    made = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], skeleton)
    return made.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _policy(script: str, style: str) -> str:
    """Return a content-security policy that lets this script and style run, and forbids the rest.

    The empty icon keeps a browser from asking for one.
    """
    digests = (
        base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        for source in (script, style)
    )
    of_script, of_style = (f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {of_script}; style-src {of_style}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _part(page: Page) -> str:
    return "sequence" if page.sequences else "window"


def _paragraphs(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{html.escape(each)}</p>" for each in sentences)


def _table(summary: Summary) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in summary.columns)
    rows = (
        f'<th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        for first, *rest in summary.rows
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        '<div class="wide" role="region" aria-label="Runs" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _data(content: Mapping[str, Any]) -> str:
    """Return JSON that no HTML can be made of."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _blob(arrays: Sequence[np.ndarray]) -> str:
    return base64.b64encode(zlib.compress(b"".join(map(bytes, arrays)), 9)).decode()


def _description(page: Page) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return everything but the past tokens: what is JSON, and bytes to which that refers."""
    made: list[np.ndarray] = []
    place = 0

    def column(whole: np.ndarray, least: int = 0) -> dict[str, int]:
        nonlocal place
        content, count = planes(whole)
        made.append(content)
        place += len(content)
        return {"at": place - len(content), "planes": count, "least": least}

    def of_values(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, int]]:
        return {name: column(*codes(np.asarray(each))) for name, each in values.items()}

    distinct, number = _distinct(page.tokens)
    index, window, position = (
        np.asarray(each) for each in (page.index, page.window, page.position)
    )
    # Where the three do not all go on: their values there say those up to the next such place.
    steps = (np.diff(index) != 1) | (np.diff(window) != 0) | (np.diff(position) != 1)
    begins = np.concatenate([[0], 1 + np.flatnonzero(steps)])
    names = {name for each in page.series for name in each.values}
    names |= {name for values in page.of_runs.values() for name in values}
    content = {
        "title": page.title,
        "count": len(page.tokens),
        "symbols": distinct,
        "tokens": column(number),
        "pieces": [begins.tolist(), *(each[begins].tolist() for each in (index, window, position))],
        "starts": [int(start) for start in page.starts],
        "breaks": [int(place) for place in page.breaks],
        "outlined": page.outlined,
        "part": _part(page),
        "inText": not page.sequences,
        "quantities": {key: QUANTITIES[key][1] for key in QUANTITIES if key in names},
        "large": [key for key in QUANTITIES if key in names & LARGE_MATTER],
        "short": {key: QUANTITIES[key][0] for key in QUANTITIES if key in names},
        "series": [
            {
                "run": each.run,
                "stage": each.stage,
                "values": of_values(each.values),
                "support": np.flatnonzero(each.support).tolist(),
                "past": each.covariance is not None,
            }
            for each in page.series
        ],
        "runs": {label: of_values(values) for label, values in page.of_runs.items()},
        "anchors": ANCHORS,
        "support": SUPPORT,
        "unknown": UNKNOWN,
        "wide": 1 + max((int(past.behind.max()) > 255 for past in _pasts(page)), default=False),
    }
    return content, made


def _distinct(tokens: Sequence[str]) -> tuple[list[str], np.ndarray]:
    numbers: dict[str, int] = {}
    number = [numbers.setdefault(token, len(numbers)) for token in tokens]
    return list(numbers), np.array(number, np.int64)


def _pasts(page: Page) -> list[Past]:
    return [
        past
        for each in page.series
        for past in (each.covariance, each.attention)
        if past is not None
    ]


def _ranks(page: Page, content: Mapping[str, Any]) -> Iterator[list[np.ndarray]]:
    """Yield bytes of the most important past tokens, then of the second, and so on."""
    pasts = _pasts(page)
    for rank in range(min((past.behind.shape[1] for past in pasts), default=0)):
        made = []
        for past in pasts:
            behind = past.behind[:, rank].astype(np.int64)
            made += [(behind >> 8 * high & 255).astype(np.uint8) for high in range(content["wide"])]
            made.append(np.rint(100 * past.share[:, rank]).astype(np.uint8))
        yield made
