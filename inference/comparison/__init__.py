"""Runs side by side: what they predict and how close to instability they came."""
