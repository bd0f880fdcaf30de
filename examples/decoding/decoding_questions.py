"""What the study asks: its sizes, its predictors and its rule, fixed before the run.

The hypotheses and the rule of `README.md` were written before any margin was looked at.
"""

from dataclasses import dataclass

AHEAD = 32  # tokens in which a loop begins, or whose loss rises; and those that a mean looks back
GRAM = 4  # tokens of the shortest n-gram that makes a loop, and of those that were seen before
COPIES = 3  # of an n-gram in succession that make a loop
PROMPT = 32  # tokens of an article that are given
NEW = 256  # tokens that are generated
COUNTED = PROMPT + 192  # positions that are counted: later many a loop might end beyond the text
WINDOW = 256  # tokens of real text that are read at once
TEMPERATURES = (0.0, 0.7)
WORST = 0.1  # share of tokens whose loss rises most
FIRST = 2  # first position that has a margin

PRIMARY = "margin_worst"
PERMUTED = f"permuted_{PRIMARY}"
RIVALS = (
    "loss",
    "entropy",
    "probability",
    "repeated",
    "position",
    "loss_mean",
    "entropy_mean",
)
"""Predictors that cost nothing: of the token itself, and their means over the last 32 tokens."""

LEAST_AUC = 0.6  # that the interval of a useful margin lies above


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        articles: how many articles of the text, the first that are long enough.
        together: articles that are measured, and kept, together.
    """

    articles: int = 60
    together: int = 10
