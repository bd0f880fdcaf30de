"""Pages made by hand, of random numbers and of tokens that a page must not stumble over."""

import numpy as np

from probattn.inference.pages.page import Page, Past, Series

HOSTILE = [
    "</script>",
    "<script>document.title='broken'</script>",
    "<img src=x onerror=\"document.title='broken'\">",
    "<!--",
    "]]>",
    "&amp;",
    "'\"`",
    "{{data}}",
    "\\u003c",
    "\x00",
    "\x1b[2J",
    "\u202eright to left\u202c",
    "\u200b",
    "\u2028",
    "\ufeff",
    "\ud800",  # half a character, which no UTF-8 has
    "\u05e9\u05dc\u05d5\u05dd",
    "\u0301",
    "e\u0301",
    "\U0001f469\u200d\U0001f4bb",
    "\u6f22\u5b57",
    "",
    "\t",
    "\n",
    " ",
]
WINDOW = 32
COUNT = 160
TOKENS = [HOSTILE[i % len(HOSTILE)] for i in range(64)] + list(
    "the margin of a token, and so on" * 3
)
"""Tokens of a page: of the hostile kind, then of characters."""


def past(rng, positions, most=8):
    """Random shares of the whole past of every position, the largest of them kept."""
    behind, share = (np.zeros((len(positions), most)) for _ in range(2))
    for row, position in enumerate(positions):
        shares = rng.dirichlet(np.full(position, 0.3)) if position else np.zeros(0)
        largest = np.argsort(-shares, kind="stable")[:most]
        behind[row, : len(largest)] = position - largest
        share[row, : len(largest)] = shares[largest]
    return Past(behind.astype(np.int64), share)


def made_series(rng, run, stage, count, *, with_past=True):
    """A stage with margins on both sides of 0, unknown and infinite ones among them."""
    margin = rng.normal(0.3, 0.3, count)
    margin[rng.integers(0, count, 3)] = np.nan
    distance = np.exp(rng.normal(size=count))
    distance[rng.integers(0, count, 3)] = np.inf
    support = np.zeros(count, bool)
    support[rng.integers(0, WINDOW, -(-count // WINDOW)) + np.arange(0, count, WINDOW)] = True
    positions = np.arange(count) % WINDOW
    values = {
        "margin": margin,
        "embedding_margin": distance,
        "certificate": 10.0 ** rng.uniform(-9, 3, count),
    }
    pasts = [past(rng, positions) if with_past else None for _ in range(2)]
    return Series(run, stage, values, support, *pasts)


def made_page(tokens, *, runs=("first", "second"), stages=2, title="a text", seed=0):
    """A page of several runs of several stages; the text is cut into windows of 32 tokens."""
    rng = np.random.default_rng(seed)
    count = len(tokens)
    assert count % WINDOW == 0
    index = np.arange(count)
    return Page(
        title=title,
        tokens=tokens,
        index=index,
        window=index // WINDOW,
        position=index % WINDOW,
        starts=list(range(0, count, WINDOW)),
        series=[
            made_series(rng, run, f"head {stage + 1}", count)
            for run in runs
            for stage in range(stages)
        ],
        of_runs={run: {"loss": rng.exponential(2.0, count)} for run in runs},
        notes=["A note with <b>markup</b> in it."],
        proved=["head 1: no text can fold it."],
    )
