"""All targets, by name."""

from fuzzing.configurations import configuration
from fuzzing.runs import metrics, run
from fuzzing.shapes import shapes
from fuzzing.texts import corpus, vocabulary

TARGETS = {
    "configuration": configuration,
    "vocabulary": vocabulary,
    "corpus": corpus,
    "run": run,
    "metrics": metrics,
    "shapes": shapes,
}
"""Each makes a target, of a folder that is its own."""
