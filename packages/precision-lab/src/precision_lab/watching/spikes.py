"""Whether a loss is a spike: far outside of what this loop's losses were, not just of what is usual elsewhere."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

WINDOW = 256
"""Losses that the median is taken of."""
FEWEST = 16
"""Losses before which nothing is judged."""
DEVIATIONS = 12.0
"""A spike is above the median by so many median absolute deviations."""
FACTOR = 4.0
"""And by so many times the largest excess over the median that was seen, which is forgotten slowly."""
FORGET = 0.9998
"""What is left of that excess after each loss: half after 3,500."""


class Spikes:
    """The losses of one place in a loop, one after the other."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._excess = 0.0
        self._in_spike = False

    def is_spike(self, loss: float) -> bool:
        """Takes the next loss, which is finite. True where a spike begins; what follows it up there is part of it."""
        if len(self._recent) < FEWEST:
            self._take(loss)
            return False
        middle = self.median
        above = loss - middle
        far = above > max(abs(middle), FACTOR * self._excess) and above > DEVIATIONS * self._deviation(middle)
        began = far and not self._in_spike
        self._in_spike = far
        if not far:
            self._excess = max(self._excess * FORGET, above)
        self._take(loss)
        return began

    @property
    def median(self) -> float:
        """Of the last losses."""
        return self._sorted[len(self._sorted) // 2]

    def _deviation(self, middle: float) -> float:
        return sorted(abs(each - middle) for each in self._sorted)[len(self._sorted) // 2]

    def _take(self, loss: float) -> None:
        if len(self._recent) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(loss)
        insort(self._sorted, loss)
