"""Rounds of chains that do not wait for each other."""

import faulthandler
import os
import threading
import time
from contextlib import closing

import pytest

from probattn.inference.sampling.lookahead import run_ahead

WAIT = 30.0  # seconds until a thread that does not come is a failure


@pytest.fixture(autouse=True)
def no_waiting_for_ever(capfd):
    """Where threads wait for each other, the process ends and says where they stand."""
    with capfd.disabled():
        stderr = os.dup(2)
    faulthandler.dump_traceback_later(2 * WAIT, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(stderr)


def few(count):
    return lambda number: number if number < count else None


@pytest.mark.parametrize(("chains", "threads"), [(1, 1), (3, 1), (3, 2), (2, 5)])
def test_rounds_come_in_order_with_the_result_of_every_chain(chains, threads):
    rounds = run_ahead(
        lambda chain, task: (chain, task), few(7), chains=chains, threads=threads, ahead=2
    )
    assert list(rounds) == [[(chain, task) for chain in range(chains)] for task in range(7)]


def test_no_rounds():
    assert list(run_ahead(lambda *_: 1 / 0, few(0), chains=2, threads=2, ahead=1)) == []


def test_a_chain_works_on_one_round_at_a_time_and_a_task_is_asked_for_once():
    at_work, asked = set(), []

    def task(number):
        asked.append(number)
        return few(20)(number)

    def work(chain, task):
        assert chain not in at_work
        at_work.add(chain)
        time.sleep(0.001)
        at_work.remove(chain)
        return task

    found = list(run_ahead(work, task, chains=3, threads=3, ahead=4))
    assert found == [[number] * 3 for number in range(20)]
    assert asked == list(range(21))


def test_a_chain_goes_ahead_of_a_slower_one_and_of_the_caller_so_far_and_no_further():
    third_begun, held = threading.Event(), threading.Event()
    begun = []

    def work(chain, task):
        begun.append((chain, task))
        if chain == 1:
            assert held.wait(WAIT)
        elif task == 2:
            third_begun.set()
        return task

    with closing(run_ahead(work, few(9), chains=2, threads=2, ahead=3)) as rounds:
        first = threading.Thread(target=next, args=(rounds,))
        first.start()
        assert third_begun.wait(WAIT)  # while the other is in its first round
        time.sleep(0.05)
        assert (0, 3) not in begun
        held.set()
        first.join(WAIT)
        deadline = time.monotonic() + WAIT
        while len(begun) < 8 and time.monotonic() < deadline:
            time.sleep(0.001)  # one round was given: each may begin one more, the caller away
        time.sleep(0.05)
        assert sorted(begun) == [(chain, task) for chain in range(2) for task in range(4)]


def test_the_chains_of_the_fewest_rounds_come_first():
    order = []

    def work(chain, task):
        order.append((task, chain))

    list(run_ahead(work, few(5), chains=4, threads=1, ahead=5))
    assert [task for task, _ in order] == sorted(task for task, _ in order)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_chain_raises_reaches_the_caller_and_ends_the_threads(threads):
    def work(chain, task):
        if (chain, task) == (1, 2):
            raise RuntimeError("lost")
        return task

    before = threading.active_count()
    found = []
    with pytest.raises(RuntimeError, match="lost"):
        found.extend(run_ahead(work, few(9), chains=3, threads=threads, ahead=2))
    assert threading.active_count() == before
    assert found == [[0] * 3, [1] * 3]  # what was whole is not lost


def test_what_the_plan_raises_reaches_the_caller():
    def task(number):
        raise ValueError("no plan")

    with pytest.raises(ValueError, match="no plan"):
        list(run_ahead(lambda *_: None, task, chains=2, threads=2, ahead=1))


def test_closing_ends_the_threads_and_begins_no_round():
    begun = []
    before = threading.active_count()
    rounds = run_ahead(
        lambda chain, task: begun.append(task),
        lambda number: number,
        chains=2,
        threads=2,
        ahead=2,
    )
    next(rounds)
    rounds.close()
    count = len(begun)
    assert threading.active_count() == before
    time.sleep(0.05)
    assert len(begun) == count <= 6


def test_what_the_caller_raises_ends_the_threads():
    def consume():
        rounds = run_ahead(lambda _, task: task, lambda n: n, chains=3, threads=2, ahead=2)
        with closing(rounds):
            for number, _ in enumerate(rounds):
                if number == 5:
                    raise OSError("no space")

    before = threading.active_count()
    with pytest.raises(OSError, match="no space"):
        consume()
    assert threading.active_count() == before


def test_a_thread_that_cannot_start_ends_the_others(monkeypatch):
    start, started = threading.Thread.start, []

    def limited(self):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    before = threading.active_count()
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        next(run_ahead(lambda _, task: time.sleep(0.1), few(9), chains=3, threads=3, ahead=2))
    assert threading.active_count() == before
