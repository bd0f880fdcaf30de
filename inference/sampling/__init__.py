"""Posteriors: samplers, chains, where they start, their draws, and runs that keep them."""
