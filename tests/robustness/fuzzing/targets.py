"""All targets, by name."""

from tests.robustness.fuzzing.command_line import command_line
from tests.robustness.fuzzing.configurations import configuration
from tests.robustness.fuzzing.pretrained import pretrained
from tests.robustness.fuzzing.runs import metrics, run
from tests.robustness.fuzzing.shapes import shapes
from tests.robustness.fuzzing.texts import corpus, vocabulary
from tests.robustness.fuzzing.values import values

TARGETS = {
    "command_line": command_line,
    "configuration": configuration,
    "vocabulary": vocabulary,
    "corpus": corpus,
    "run": run,
    "metrics": metrics,
    "pretrained": pretrained,
    "shapes": shapes,
    "values": values,
}
"""Each makes a target, of a folder that is its own."""
