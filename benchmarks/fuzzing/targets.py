"""All targets, by name."""

from fuzzing.configurations import configuration
from fuzzing.texts import corpus, vocabulary

TARGETS = {
    "configuration": configuration,
    "vocabulary": vocabulary,
    "corpus": corpus,
}
"""Each makes a target, of a folder that is its own."""
