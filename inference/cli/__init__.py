"""The command `probattn`: parse, call, print."""

from probattn.inference.cli.command_line import main

__all__ = ["main"]
