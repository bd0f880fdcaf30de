"""Guides: the families that approximate a posterior, and draws from those of fitted runs."""
