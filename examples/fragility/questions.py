"""What the study asks: its scales, its predictors and its hypothesis, fixed before the run.

The hypothesis and the two questions of `README.md` were written before any held-out token was read.
"""

from dataclasses import dataclass

RIVALS = (
    "loss",
    "entropy",
    "position",
    "frequency",
    "embedding_norm",
    "attention_max_first",
    "attention_entropy_first",
    "attention_max",
    "attention_entropy",
    "token_constraint_bound",
    "gradient",
    "loss_slope",
)
"""Predictors that cost nothing, or that others have published."""

CONTROLS = ("loss", "entropy")  # and the token's type: what partial correlations hold fixed
PLACE = "position"  # what a second partial correlation holds fixed too
PRIMARY = "sigma_min_worst"
PRIMARY_HARM = "noise_0.25"
PERMUTED = f"permuted_{PRIMARY}"
HARM = "harm_"  # what names of harms begin with in a table of tokens
SIZE = "abs_"  # what names of the sizes of harms begin with
PLACES = ("document", "window", "position", "type")

NOISE = (0.1, 0.25, 0.5)  # of the embeddings' root mean square
BITS = (8, 4, 3, 2)
SCOPES = {"first": ("embedding", "layers.0."), "all": ("",)}
DROPPED = 0.1  # share of a head's past that it loses
ASCENT_LEVEL, ASCENT_STEPS = 0.05, 3
FOLLOWING = 4  # predictions that are counted where the token itself is replaced
WORST = 0.05  # share of tokens that are called the worst


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        tokens: tokens of the text, in windows spread evenly over it.
        draws: draws of noise, and of what attention loses, over which losses are averaged.
        directions: random directions that the slope of a loss is measured along.
        spectrum_tokens: tokens whose real block is decomposed, which takes longest.
        chunk: windows that are measured, and kept, together.
    """

    tokens: int
    draws: int = 2
    directions: int = 4
    spectrum_tokens: int = 1024
    chunk: int = 8


SCALES = {"small": Scale(8_192), "full": Scale(51_200, spectrum_tokens=2048)}
