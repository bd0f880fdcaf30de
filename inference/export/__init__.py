"""Posteriors and runs as ArviZ DataTrees, and what ArviZ says of them."""
