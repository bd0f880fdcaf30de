"""Rounds of several members, each of which goes on without waiting for the others."""

import threading
from collections import deque
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
    """Results of `work(member, task(number))` of all members, for rounds 0, 1, ... in order.

    A member works on one round after another. It begins the next as soon as a thread is free,
    those of the fewest rounds first, so that none waits for a slower one, and the caller's own
    work between two rounds costs nothing.

    Close the iterator (`contextlib.closing`) unless it comes to its end: the threads wait for
    that. Closing waits for what is in progress; rounds that were not given are lost, and an error
    in one of them is dropped.

    Args:
        work: what a member does, in any of the threads.
        task: of a round; None ends the rounds. Called once for each, when its first member begins
            it, and by one thread at a time.
        chains: their number.
        threads: how many members work at once.
        ahead: rounds that a member may have begun and the caller not been given.

    Yields:
        Results of a round, by member.

    Raises:
        Exception: what `work` or `task` raises, after the rounds that were whole before and after
            the threads have ended.
    """
    rounds = _Rounds(work, task, chains=chains, threads=threads, ahead=ahead)
    workers: list[Future] = []
    with ThreadPoolExecutor(threads) as pool:
        try:
            workers.extend(pool.submit(rounds.work_on) for _ in range(threads))
            while (results := rounds.next()) is not None:
                yield results
        finally:
            rounds.close()
    for worker in workers:
        worker.result()


class _Rounds[Task, Result]:
    """What the threads share; all of it changes under one lock.

    The caller's thread takes no more than that lock and a queue, neither of them written in
    Python: a signal whose handler raises leaves both as they were.
    """

    def __init__(
        self,
        work: Callable[[int, Task], Result],
        task: Callable[[int], Task | None],
        *,
        chains: int,
        threads: int,
        ahead: int,
    ) -> None:
        self._work, self._task, self._ahead = work, task, ahead
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._tasks: list[Task | None] = []
        self._begun = [0] * chains
        self._idle = set(range(chains))
        self._done: list[deque[Result]] = [deque() for _ in range(chains)]
        self._whole: SimpleQueue[list[Result] | None] = SimpleQueue()
        self._given = 0
        self._threads = threads
        self._closed = False

    def work_on(self) -> None:
        """In a thread: rounds, until there are no more or the rounds are closed."""
        try:
            while (begun := self._begin()) is not None:
                self._end(begun[0], self._work(*begun))
        except BaseException:
            self.close()
            raise
        finally:
            with self._lock:
                self._threads -= 1
                if not self._threads:
                    self._whole.put(None)

    def next(self) -> list[Result] | None:
        """The results of the next round, once there are; None after the last."""
        results = self._whole.get()
        with self._lock:
            self._given += 1
            self._changed.notify_all()
        return results

    def close(self) -> None:
        """Let the threads begin no more rounds."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def _begin(self) -> tuple[int, Task] | None:
        """A member and its next task, once one may begin it; None if none will."""
        with self._lock:
            while not self._closed:
                member = min(self._idle, key=self._begun.__getitem__, default=None)
                if member is not None and self._begun[member] < self._given + self._ahead:
                    number = self._begun[member]
                    if number == len(self._tasks):
                        self._tasks.append(self._task(number))
                    if (task := self._tasks[number]) is None:
                        return None
                    self._begun[member] += 1
                    self._idle.remove(member)
                    return member, task
                self._changed.wait()
            return None

    def _end(self, member: int, result: Result) -> None:
        with self._lock:
            self._done[member].append(result)
            if all(self._done):
                self._whole.put([results.popleft() for results in self._done])
            self._idle.add(member)
            self._changed.notify_all()
