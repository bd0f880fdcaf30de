"""Machinery of the r x r blocks R_t: covariances, determinants, and which of them are computed."""
