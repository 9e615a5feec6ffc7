"""What no judgement by losses is needed for: runs that failed, updates that round to nothing, losses far away."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from precision_lab.choice import Candidate
from precision_lab.results import BASELINE, Comparison, Row
from precision_lab.updates import TOO_MANY

HOPELESS = 10.0
"""Standard deviations of 32-true by which a mode has to be worse in the race with every seed, to be out: that of three
seeds is a tenth of the true one in one case of a hundred."""
SKIPPED, SETTLING = 0.2, 16
"""Share of skipped steps from which on a mode is not trusted; a loss scale may take so many to settle."""


def disqualify(each: Candidate, rows: Sequence[Row]) -> None:
    """Judges a candidate whose runs failed, skipped too many steps, or swallowed too many updates; leaves others."""
    done = [row for row in rows if row.status == "done"]
    failed = next((row for row in rows if row.status == "failed"), None)
    each.unchanged = statistics.fmean(row.unchanged_share for row in done) if done else 0.0
    counts = [(row.skipped_steps or 0, len(row.losses)) for row in done]
    skipped = max((count / steps for count, steps in counts if count > SETTLING), default=0.0)
    if failed is not None:
        each.judged, each.reason = "failed", f"{failed.reason}, seed {failed.seed}"
    elif skipped > SKIPPED:
        each.judged, each.reason = "failed", f"{skipped:.0%} of the steps were skipped: gradients overflowed"
    elif each.unchanged > TOO_MANY:
        each.judged, each.reason = "swallows", f"{each.unchanged:.0%} of the updates round to nothing"


def is_hopeless(race: Comparison, mode: str) -> bool:
    """Whether the mode is so much worse in a race that no seeds are needed to say so."""
    spread, losses, base = race.spread(), _held_out(race, mode), _held_out(race, BASELINE)
    pairs = [losses[seed] - base[seed] for seed in losses.keys() & base.keys()]
    return bool(spread) and len(pairs) >= 2 and min(pairs) > HOPELESS * (spread or 0.0)


def losses_of(rows: Sequence[Row]) -> dict[int, float]:
    """Returns seed -> held-out loss."""
    return {row.seed: row.held_out_loss for row in rows if row.held_out_loss is not None}


def swallowed_by_module(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the share of each module's updates that rounded to nothing."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        for name, same, seen in row.unchanged:
            count = counts.setdefault(name.rpartition(".")[0], [0, 0])
            count[0], count[1] = count[0] + same, count[1] + seen
    return {name: same / seen for name, (same, seen) in counts.items() if seen}


def _held_out(race: Comparison, mode: str) -> dict[int, float]:
    return losses_of([row for row in (*race.rows, *race.repeats) if row.mode == mode and row.status == "done"])
