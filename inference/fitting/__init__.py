"""Fits by SVI: the step, the loop around it, and what it leaves in a run."""
