"""Tasks in several processes, each on a core of its own; a signal ends them with their state saved.

One process computes a small model faster on one core than on two: two runs side by side take little
more than half the time of one after the other.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from probattn.inference.runtime.compilation_cache import keep_compiled_programs
from probattn.inference.runtime.signals import Ended, ended_by_signals

_LONGEST = 8_000  # characters of a message: a pipe that is not read takes few more


def run_here[Task](
    tasks: Sequence[Task], work: Callable[[Task], None]
) -> Iterator[tuple[Task, float, str]]:
    """Run tasks one after the other in this process.

    Yields:
        A task that has ended, the seconds that it took, and why it failed, "" if it did not.

    Raises:
        Ended: on SIGINT or SIGTERM, after the state of every run was saved.
    """
    with ended_by_signals():
        for task in tasks:
            started, failed = time.monotonic(), ""
            try:
                work(task)
            except (OSError, RuntimeError, ValueError) as error:
                failed = str(error)
            yield task, time.monotonic() - started, failed


def run_apart[Task](
    tasks: Sequence[Task], work: Callable[[Task], None], *, jobs: int, command: str
) -> Iterator[tuple[Task, float, str]]:
    """Run each task in a process of its own, so many at a time, each on a core.

    Args:
        tasks: the tasks, which a process can be given.
        work: does one; a function of a module.
        jobs: how many at a time, at least 1.
        command: what the processes call themselves where they print a line that is no result.

    Yields:
        As `run_here`.

    Raises:
        Ended: on SIGINT or SIGTERM, after the state of every run was saved.
    """
    processes = multiprocessing.get_context("spawn")
    cores = _cores()
    waiting = list(reversed(tasks))
    busy: dict[Any, tuple[BaseProcess, Connection, int, Task, float]] = {}
    free = list(range(jobs))
    with ended_by_signals():
        try:
            while waiting or busy:
                while waiting and free:
                    slot, task = free.pop(), waiting.pop()
                    core = cores[slot % len(cores)] if cores else None
                    reader, writer = processes.Pipe(duplex=False)
                    process = processes.Process(
                        target=_child, args=(task, work, core, command, writer)
                    )
                    process.start()
                    writer.close()
                    busy[process.sentinel] = (process, reader, slot, task, time.monotonic())
                for sentinel in wait(list(busy)):
                    ended, reader, slot, task, started = busy.pop(sentinel)
                    ended.join()
                    free.append(slot)
                    yield task, time.monotonic() - started, _failure(ended, reader)
        finally:
            _end([process for process, *_ in busy.values()])


def _end(processes: Sequence[BaseProcess]) -> None:
    """Ask each once: a second signal would end it at once, with the last checkpoint's state."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _failure(process: BaseProcess, reader: Connection) -> str:
    with reader:
        try:
            return reader.recv()
        except EOFError:
            return f"its process ended with exit status {process.exitcode}"


def _child[Task](
    task: Task, work: Callable[[Task], None], core: int | None, command: str, writer: Connection
) -> None:
    # Out of the terminal's process group: the parent passes signals on, each of them once.
    if hasattr(os, "setsid"):
        os.setsid()
    if core is not None:
        os.sched_setaffinity(0, {core})  # before JAX counts the cores
    keep_compiled_programs(partial(tell, command))
    failed = ""
    try:
        with ended_by_signals():
            work(task)
    except Ended as ended:
        sys.exit(128 + ended.signum)
    except (OSError, RuntimeError, ValueError) as error:
        failed = str(error)
    writer.send(failed[:_LONGEST])


def exit_status(command: str, work: Callable[[], int | None]) -> int:
    """Do the work of a script that goes on where it was interrupted, and return its exit status.

    It is what the work returns, 0 for None. A signal, and what a user can mend, are told in a line.

    Args:
        command: name of the script.
        work: what it does.
    """
    keep_compiled_programs(partial(tell, command))
    try:
        with ended_by_signals():
            return work() or 0
    except Ended as ended:
        tell(command, f"{ended}; the same command goes on from here")
        return 128 + ended.signum
    except (OSError, ValueError) as error:
        tell(command, str(error))
        return 2


def tell(command: str, line: str) -> None:
    """Print a line that is no result, in the name of the command."""
    print(f"{command}: {line}", file=sys.stderr)


def _cores() -> list[int]:
    """Return the cores that this process may use, where the system tells and lets choose."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
