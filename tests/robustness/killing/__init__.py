"""Kills of `probattn` at any moment, and what must be there afterwards."""
