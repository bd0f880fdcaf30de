"""Commands and code that a page shows, run at a tiny size."""

import shlex

import jax

from probattn.inference.cli import main
from tests.support.markdown import code_blocks
from tests.support.small import (
    EVALUATE_FLAGS,
    FLAGS,
    LATENT_FLAGS,
    SAMPLE_FLAGS,
    SENSITIVITY_FLAGS,
    TUNE_FLAGS,
)

SMALL = {
    "fit": FLAGS,
    "sample": SAMPLE_FLAGS,
    "evaluate": EVALUATE_FLAGS,
    "sensitivity": SENSITIVITY_FLAGS,
}


def blocks(language, text):
    """Return the fenced blocks of a language, long commands on one line."""
    joined = text.replace("\\\n", " ") if language != "python" else text
    return code_blocks(joined, language)


def run_commands(section):
    """Run the commands of a section at a tiny size, then its code; the names that the code sets.

    The commands run where JAX is told to promote nothing, as some of their users tell it.
    """
    lines = "".join(blocks("bash", section)).splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("probattn ")]
    for command in commands:
        small = SMALL.get(command[0], [])
        if command[0] == "fit" and "--from" in command:
            small = TUNE_FLAGS
        if "latent" in command:
            small = [*small, *LATENT_FLAGS]
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            assert main(command + small) == 0, command
    namespace = {}
    for block in blocks("python", section):
        exec(compile(block, "page", "exec"), namespace)
    return {command[0] for command in commands}, namespace
