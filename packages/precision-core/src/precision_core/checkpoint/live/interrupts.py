"""Holding interrupts back: an exception that comes between any two bytecodes leaves half of something behind.

A KeyboardInterrupt inside of `with torch.no_grad()` may even leave gradients off for good, in any program.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any


class InterruptsHeld:
    """Context in which no signal handler written in Python runs, but where `deliver` is called, and at its end.

    Handlers run in the main thread only, so elsewhere there is nothing to hold back.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, Any], Any]] = {}
        self._came: list[int] = []

    def __enter__(self) -> InterruptsHeld:
        if threading.current_thread() is threading.main_thread():
            handlers = {int(number): signal.getsignal(number) for number in signal.valid_signals()}
            self._handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
        try:
            for number in self._handlers:
                signal.signal(number, lambda number, _: self._came.append(number))
        except BaseException:
            self._give_back()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()
        self.deliver()

    def deliver(self) -> None:
        """Runs the handlers of the signals that came, in their order, whatever they raise."""
        if self._came:
            number = self._came.pop(0)
            try:
                self._handlers[number](number, sys._getframe())
            finally:
                self.deliver()

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
