"""Rounds of several chains, each of which goes on without waiting for the others."""

import itertools
import math
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue


def run_ahead[Task, Result](
    work: Callable[[int, Task], Result],
    task: Callable[[int], Task | None],
    *,
    chains: int,
    threads: int,
    ahead: int,
) -> Generator[list[Result]]:
    """Yield the results of `work(chain, task(number))` of all chains, round after round.

    Every chain has a thread, and works on one round after another. It waits for no slower chain
    and not for the caller, unless it is `ahead` rounds in front.

    Close the iterator (`contextlib.closing`) unless it comes to its end: the threads wait for
    that. Closing waits for what is in progress; rounds that were not given are lost, and an error
    in one of them is dropped.

    Args:
        work: what a chain does in a round, in its thread.
        task: the task of a round; None ends the rounds. It is called once for each round, when
            the first chain begins it, and by one thread at a time.
        chains: number of chains.
        threads: number of chains that work at once.
        ahead: rounds that a chain may have begun and the caller not been given.

    Yields:
        Results of a round, by chain.

    Raises:
        Exception: what `work` or `task` raises, after the rounds before it were given and the
            threads have ended.
    """
    lock, turns = threading.Lock(), threading.Semaphore(threads)
    tasks: list[Task | None] = []
    stop = math.inf  # no chain begins this round or a later one
    # A queue of permits is a semaphore for each chain. Python's own is written in Python, and a
    # signal whose handler raises in the caller's thread could leave it locked.
    permits: list[SimpleQueue[None]] = [SimpleQueue() for _ in range(chains)]
    results: list[SimpleQueue[tuple[Result, ...]]] = [SimpleQueue() for _ in range(chains)]

    def permit() -> None:
        for queue in permits:
            queue.put(None)

    def begin(number: int) -> Task | None:
        with lock:
            if number >= stop:
                return None
            if number == len(tasks):
                tasks.append(task(number))
            return tasks[number]

    def end(number: int) -> None:
        nonlocal stop
        with lock:
            stop = min(stop, number)

    def work_on(chain: int) -> None:
        number = 0
        try:
            for number in itertools.count():
                permits[chain].get()
                with turns:
                    if (planned := begin(number)) is None:
                        return
                    results[chain].put((work(chain, planned),))
        except BaseException:
            end(number)
            raise
        finally:
            results[chain].put(())

    for _ in range(ahead):
        permit()
    workers: list[Future] = []
    with ThreadPoolExecutor(chains) as pool:
        try:
            workers.extend(pool.submit(work_on, chain) for chain in range(chains))
            while all(parts := [queue.get() for queue in results]):
                permit()
                yield [result for (result,) in parts]
        finally:
            end(0)
            permit()
    for worker in workers:
        worker.result()
