"""Evidence: whether held-out losses of some seeds say that a mode trains as 32-true does.

Both train with the same seeds. From the same weights and batches their losses differ by less than two seeds do, so that
the difference of each pair is what counts. Safe: the mean difference is below one standard deviation of 32-true over
seeds, and stays below when it is raised to the upper end of its 95 % interval, and the standard deviation lowered to
the one that is exceeded in four cases of five. Worse: the lower end of the interval is above. Else: more seeds.
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
"""Number of pairs -> by how many standard errors 95 % of Student's distribution reach to both sides."""
_SPREAD = {3: 0.788, 5: 0.817, 8: 0.845, 12: 0.867, 16: 0.881}
"""Number of seeds -> the standard deviation's lower limit, in units of what was found: 80 % of the time it is more."""


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
    student = _STUDENT[max(count for count in _STUDENT if count <= len(pairs))]
    margin = student * statistics.stdev(pairs) / math.sqrt(len(pairs))
    known = [count for count in _SPREAD if count <= len(baseline)]
    answer: Answer = "undecided"
    if len(pairs) >= LOOKS[1] and difference + margin <= _SPREAD[max(known)] * spread:
        answer = "safe"
    elif len(pairs) >= LOOKS[0] and difference - margin > spread:
        answer = "worse"
    return Evidence(len(pairs), difference, margin, spread, answer)
