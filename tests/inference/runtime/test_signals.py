"""Signals: one of them ends a computation, and a burst of them is one."""

import os
import signal
import types

import pytest

from probattn.inference.runtime import signals
from probattn.inference.runtime.signals import (
    ENDING,
    Ended,
    deferred_interrupts,
    ended_by_signals,
    ignore_signals,
)


@pytest.fixture(name="later")
def later_fixture(monkeypatch):
    """A function that makes the burst end, by the clock that the signals are heard by."""
    now = [0.0]
    monkeypatch.setattr(signals, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def later():
        now[0] += 60

    return later


@pytest.mark.parametrize("signum", ENDING)
def test_a_signal_ends_a_computation(signum):
    with pytest.raises(Ended, match=f"^ended by {signum.name}$") as raises, ended_by_signals():
        signal.raise_signal(signum)
    assert raises.value.signum == signum


def test_a_burst_is_one_signal_and_a_later_one_is_another(later):
    with ended_by_signals():
        with pytest.raises(Ended):
            signal.raise_signal(signal.SIGINT)
        for signum in ENDING:
            signal.raise_signal(signum)
        later()
        with pytest.raises(Ended):
            signal.raise_signal(signal.SIGHUP)


def test_a_burst_leaves_the_time_to_save(later):
    with ended_by_signals():
        with deferred_interrupts() as interrupted:
            assert interrupted() == 0
            signal.raise_signal(signal.SIGHUP)
            for signum in ENDING:
                signal.raise_signal(signum)
            assert interrupted() == signal.SIGHUP
        signal.raise_signal(signal.SIGTERM)  # the burst goes on when all is saved
        later()
        with pytest.raises(Ended):
            signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_acts_at_once(later):
    with deferred_interrupts() as interrupted:
        signal.raise_signal(signal.SIGTERM)
        later()
        with pytest.raises(Ended, match="SIGINT"):
            signal.raise_signal(signal.SIGINT)
        assert interrupted() == signal.SIGTERM


def test_signals_are_ignored_when_one_is_being_obeyed(later):
    with ended_by_signals():
        ignore_signals()
        later()
        for signum in ENDING:
            signal.raise_signal(signum)


def test_a_signal_that_the_process_ignores_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals(), deferred_interrupts() as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupted()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
