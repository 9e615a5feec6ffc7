"""Interrupts wait for a moment when they do no harm, and none is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from precision_core.checkpoint.live.interrupts import InterruptsHeld


@pytest.fixture(autouse=True)
def _pythons_own_handler() -> Iterator[None]:
    """A shell that starts a command in the background has it ignore interrupts, and its children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_end() -> None:
    done = False
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), InterruptsHeld():
        signal.raise_signal(signal.SIGINT)
        done = True
    assert done and signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_comes_where_it_is_let_in() -> None:
    done = False
    with InterruptsHeld() as held:
        held.deliver()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            held.deliver()
        done = True
    assert done


def test_every_handler_runs_in_the_order_of_the_signals() -> None:
    seen: list[int] = []

    def count(number: int, frame: object) -> None:
        seen.append(number)

    old, before = signal.signal(signal.SIGTERM, count), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt), InterruptsHeld():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert seen == []
        assert signal.getsignal(signal.SIGTERM) is count and signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGTERM, old)
    assert seen == [signal.SIGTERM]


def test_threads_have_nothing_to_hold_back() -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with InterruptsHeld() as held:
                held.deliver()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []
