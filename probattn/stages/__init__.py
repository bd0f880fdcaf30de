"""Stages of real attention: rotated, normalised, capped or grouped queries and keys."""
