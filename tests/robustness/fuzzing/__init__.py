"""Hostile input: what the readers and the array functions are given to eat."""
