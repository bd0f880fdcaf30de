"""Run directories on disk: files, checkpoints, segments of draws, and the run that holds them."""
