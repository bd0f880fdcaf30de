"""Hostile input: what the readers, the array functions and the command line are given to eat."""
