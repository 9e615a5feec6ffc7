"""Evidence: whether held-out losses of some seeds say that a mode trains as 32-true does.

Both train with the same seeds. From the same weights and batches their losses differ by less than two seeds do, so that
the difference of each pair is what counts. The bound is one standard deviation of 32-true's losses over seeds, which a
few seeds know roughly too. From the 95 % intervals of both follows one of their distance (the squares of the two
margins add up: MOVER, Zou and Donner 2008). Safe: all of it is below the bound. Worse: all of it is above. Else more
seeds are needed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Answer = Literal["safe", "worse", "undecided"]

LOOKS = (3, 5, 8, 12, 16)
"""Seeds after which the losses are looked at; safe is said from the second look on."""
_STUDENT = {2: 12.706, 3: 4.303, 5: 2.776, 8: 2.365, 12: 2.201, 16: 2.131}
"""Pairs -> standard errors on both sides of the mean that hold 95 % of Student's distribution."""
_LOWEST = {2: 0.510, 3: 0.578, 5: 0.649, 8: 0.705, 12: 0.748, 16: 0.775}
"""Seeds -> the standard deviation that is exceeded in 95 % of cases, in units of what was found (chi-squared)."""
_HIGHEST = {2: 15.95, 3: 4.415, 5: 2.372, 8: 1.797, 12: 1.551, 16: 1.437}
"""The same of the one that is not exceeded."""


@dataclass(frozen=True)
class Evidence:
    """What some pairs of losses say; everything in the loss's own unit."""

    seeds: int
    difference: float
    """The mean over seeds of the held-out loss minus 32-true's."""
    margin: float
    """Half of the difference's 95 % interval."""
    spread: float
    """32-true's standard deviation over seeds."""
    answer: Answer

    @property
    def in_spreads(self) -> float | None:
        """The difference in units of the spread."""
        return self.difference / self.spread if self.spread else None


def weigh(losses: Mapping[int, float], baseline: Mapping[int, float]) -> Evidence:
    """Returns what the held-out losses (seed -> loss) of a mode say beside those of 32-true, for two seeds or more."""
    seeds = sorted(losses.keys() & baseline.keys())
    pairs = [losses[seed] - baseline[seed] for seed in seeds]
    difference = statistics.fmean(pairs)
    spread = statistics.stdev(baseline.values())
    margin = _at(_STUDENT, len(pairs)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    below = math.hypot(margin, spread * (1 - _at(_LOWEST, len(baseline))))
    above = math.hypot(margin, spread * (_at(_HIGHEST, len(baseline)) - 1))
    answer: Answer = "undecided"
    if len(pairs) >= LOOKS[1] and difference + below <= spread:
        answer = "safe"
    elif len(pairs) >= LOOKS[0] and difference - above > spread:
        answer = "worse"
    return Evidence(len(pairs), difference, margin, spread, answer)


def _at(table: Mapping[int, float], count: int) -> float:
    return table[max(each for each in table if each <= count)]
