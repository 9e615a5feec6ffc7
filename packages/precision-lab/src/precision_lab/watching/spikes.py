"""Whether a loss is a spike: far outside of what this loop's losses were, not just of what is usual elsewhere."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

WINDOW = 256
"""Losses that the median is taken of, and the deviation from it, half of which are larger."""
FEWEST = 32  # a multiple of `_EVERY`
"""Losses before which nothing is judged."""
DEVIATIONS = 12.0
"""A spike is above the median by so many deviations, and at twice the median at least."""
FACTOR = 6.0
"""And by so many times the largest excess that was seen, in deviations of its time: noise has heavy tails."""
FORGET = 0.99995
"""What is left of that excess after each loss: half after 14,000."""
_EVERY = 16


class Spikes:
    """The losses of one place in a loop, one after the other."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._number = 0
        self._deviation = 0.0
        self._excess = 0.0
        self._in_spike = False

    def is_spike(self, loss: float) -> bool:
        """Takes the next loss, which is finite. True where a spike begins; what follows it up there is part of it."""
        began = False
        if self._number >= FEWEST:
            if self._number % _EVERY == 0:
                self._deviation = self._deviate()
            if self._number == FEWEST and self._deviation > 0:
                self._excess = (self._sorted[-1] - self.median) / self._deviation
            middle = self.median
            # Few losses say little of how far the next may be.
            usual = max(DEVIATIONS, FACTOR * (1 + 64 / self._number) * self._excess) * self._deviation
            above = loss - middle
            far = above > max(abs(middle), usual)
            began, self._in_spike = far and not self._in_spike, far
            if not far and self._deviation > 0:
                self._excess = max(self._excess * FORGET, above / self._deviation)
        self._take(loss)
        return began

    @property
    def median(self) -> float:
        """Of the last losses."""
        return self._sorted[len(self._sorted) // 2]

    def _deviate(self) -> float:
        middle = self.median
        found = sorted(abs(each - middle) for each in self._sorted)[len(self._sorted) // 2]
        return max(found, 1e-3 * abs(middle))

    def _take(self, loss: float) -> None:
        self._number += 1
        if len(self._recent) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(loss)
        insort(self._sorted, loss)
