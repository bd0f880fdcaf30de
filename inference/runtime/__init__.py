"""The machine and the process: memory, threads, signals, progress, processes, compiled programs."""
