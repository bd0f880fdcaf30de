"""All targets, by name."""

from fuzzing.command_line import command_line
from fuzzing.configurations import configuration
from fuzzing.runs import metrics, run
from fuzzing.shapes import shapes
from fuzzing.texts import corpus, vocabulary
from fuzzing.values import values

TARGETS = {
    "command_line": command_line,
    "configuration": configuration,
    "vocabulary": vocabulary,
    "corpus": corpus,
    "run": run,
    "metrics": metrics,
    "shapes": shapes,
    "values": values,
}
"""Each makes a target, of a folder that is its own."""
