"""Commands of `probattn` in processes of their own, killed from without or from within."""

import itertools
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

PRELOADED = [
    "probattn.inference.cli",
    "probattn.inference.figures.report",
    "probattn.inference.export.to_arviz",
]
WORDS = ("the token", "of a", "margin", "and", "[so]", "on, with", "\n")
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


class Laboratory:
    """Processes in which commands run and are killed.

    They are forked from one that has imported everything and has started no thread; what they
    compile is kept on disk.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "MPLBACKEND": "Agg",
            # The killed leave semaphores of their progress bars, which the last process removes.
            "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
        }
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        words = random.Random(0)
        text = "".join(WORDS) + " ".join(words.choice(WORDS) for _ in range(600))
        (folder / "corpus.txt").write_text(text, encoding="utf-8")

    def run(
        self, arguments: list[str], run: Path, *, at: int = 0, after: float | None = None
    ) -> tuple[int, list[str]]:
        """Run a command, killed at an event (counted from 1) or after seconds, or not at all.

        Returns:
            Its exit status, negative for a signal, and the lines that it printed: the last is the
            event at which it was killed, or the number of events if it was not.
        """
        log = self.folder / "log.txt"
        log.write_bytes(b"")
        process = self._context.Process(
            target=_command, args=(arguments, str(run), str(log), at, self.rng.random())
        )
        process.start()
        process.join(after)
        if process.is_alive():
            process.kill()
            process.join()
        status = process.exitcode
        process.close()
        assert status is not None
        return status, log.read_text(encoding="utf-8", errors="replace").splitlines()


def _command(arguments: list[str], run: str, log: str, at: int, seed: float) -> None:
    """In a process of its own: one command of `probattn`, which may kill itself."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    # Fifty segments in place of one every half a minute.
    sys.modules["probattn.inference.sampling.sample"].SAVE_SECONDS = 0.0
    sys.modules["probattn.inference.sampling.chains"].CALL_SECONDS = 0.0
    count = _arm(run, at, random.Random(seed))
    status = sys.modules["probattn.inference.cli"].main(arguments)
    print(f"events: {next(count) - 1}", flush=True)
    os._exit(status)


def _arm(run: str, at: int, rng: random.Random) -> "itertools.count[int]":
    """Kill this process at an event of its run; the counter of events."""
    count, synced, sync = itertools.count(1), dict[int, int](), os.fsync

    def happens(name: str, path: object, descriptor: int | None = None) -> None:
        if not str(path).startswith(run) or next(count) != at:
            return
        if descriptor is not None and Path(str(path)).is_file():
            known = os.fstat(descriptor)
            safe = min(synced.get(known.st_ino, 0), known.st_size)  # it may have become shorter
            os.truncate(str(path), rng.randint(safe, known.st_size))
        relative = str(path)[len(run) + 1 :]
        print(f"\n{name} {relative}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event in EVENTS and isinstance(arguments[0], str | os.PathLike):
            happens(event, os.fspath(arguments[0]))

    def fsync(descriptor: int) -> None:
        happens("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), descriptor)
        sync(descriptor)
        known = os.fstat(descriptor)
        synced[known.st_ino] = known.st_size

    if Path(run, "metrics.jsonl").exists():  # of a process before, which had synced it
        known = os.stat(Path(run, "metrics.jsonl"))
        synced[known.st_ino] = known.st_size
    os.fsync = fsync
    sys.addaudithook(audit)
    return count
