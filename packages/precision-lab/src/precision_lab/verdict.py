"""The verdict: which modes train as 32-true does, as far as its own spread over seeds can tell, and what they save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from precision_lab.results import BASELINE, REFERENCE, Comparison, Row, percent
from precision_lab.updates import TOO_MANY
from precision_lab.variants import spelled, split_variants

SAFE = 1.0
"""Standard deviations of 32-true's held-out loss over seeds by which a mode may be worse."""

Judgement = Literal["safe", "worse", "swallows", "unknown"]
"""Swallows: the loss is as good, but too many updates round to nothing for a longer run."""


@dataclass(frozen=True)
class Verdict:
    """What to take, in sentences; `modes` says for each finished mode what it is."""

    headline: str
    sentences: tuple[str, ...]
    modes: dict[str, Judgement]
    take: str | None
    """The mode to take, None where nothing can be said."""


def judge(comparison: Comparison) -> Verdict:
    """Returns the verdict on the finished modes."""
    done = [row for row in comparison.rows if row.status == "done"]
    judged = {row.mode: _judgement(comparison, row) for row in done}
    spread, seeds = comparison.spread(), comparison.seeds_of(BASELINE)
    if spread is None:
        why = "No finished 32-true" if comparison.find(BASELINE) is None else "One seed of 32-true"
        return Verdict(
            "No verdict: nothing to measure a difference by",
            (f"{why}: what a mode loses is measured by 32-true's spread over two seeds or more (--seeds 3).",),
            judged,
            None,
        )
    safe = [row for row in done if judged[row.mode] == "safe" and row.mode != REFERENCE]
    swallows = [row for row in done if judged[row.mode] == "swallows"]
    best = min(safe, key=lambda row: (_bytes(row), comparison.time_ratio(row) or 1.0))
    sentences = [_sentence(comparison, best)] if best.mode != BASELINE else []
    fastest = min(safe, key=lambda row: comparison.time_ratio(row) or 1.0)
    gain = (comparison.time_ratio(fastest) or 1.0) / (comparison.time_ratio(best) or 1.0)
    if fastest.mode not in (best.mode, BASELINE) and gain < 0.97:
        sentences.append(f"Faster: {_sentence(comparison, fastest)}")
    for row in swallows:
        sentences.append(
            f"Not taken: {row.mode}, held-out {comparison.difference(row):+.4f} in these steps, but "
            f"{row.unchanged_share:.0%} of its updates round to nothing: longer runs fall behind."
        )
    for row in done:
        if judged[row.mode] == "worse":
            sentences.append(
                f"Worse: {row.mode}, held-out {comparison.difference(row):+.4f}, {comparison.in_spreads(row):.1f} "
                f"standard deviations of 32-true over seeds{_beside_its_own(comparison, row)}."
            )
    sentences.append(
        f"From seed to seed 32-true itself differs by {spread:.2g} (standard deviation of {seeds}): smaller "
        "differences are not told apart, and a few seeds measure it roughly."
    )
    headline = f"Take {best.mode}" if best.mode != BASELINE else "Stay with 32-true"
    return Verdict(headline, tuple(sentences), judged, best.mode)


def _judgement(comparison: Comparison, row: Row) -> Judgement:
    if row.mode in (BASELINE, REFERENCE):
        return "safe"
    spreads = comparison.in_spreads(row)
    if spreads is None or spreads > SAFE:
        return "unknown" if spreads is None else "worse"
    return "swallows" if row.unchanged_share > TOO_MANY else "safe"


def _beside_its_own(comparison: Comparison, row: Row) -> str:
    """Returns what the precision alone costs a variant: the difference from 32-true with the same variant."""
    precision, variants = split_variants(row.mode)
    base = comparison.find(spelled(BASELINE, variants))
    mine, its = comparison.difference(row), None if base is None else comparison.difference(base)
    if base is None or not variants or precision == BASELINE or mine is None or its is None:
        return ""
    return f" ({mine - its:+.4f} beside {base.mode})"


def _bytes(row: Row) -> int:
    kinds = (row.parameter_bytes, row.gradient_bytes, row.optimizer_bytes)
    return sum(kind or 0 for kind in kinds)


def _sentence(comparison: Comparison, row: Row) -> str:
    spreads, ratio, baseline = comparison.in_spreads(row), comparison.time_ratio(row), comparison.find(BASELINE)
    text = f"{row.mode} trains as 32-true does: held-out {comparison.difference(row):+.4f}"
    text += f", {abs(spreads or 0.0):.1f} standard deviations of 32-true over seeds"
    if row.trains is not None and baseline is not None and row.trains != baseline.trains:
        text += f"; it trains {percent(row.trains)} of the parameters"
    if ratio is not None:
        text += f"; {ratio:.2f} x its time"
    if baseline is not None and _bytes(baseline):
        text += f", {_bytes(row) / _bytes(baseline):.2f} x its bytes of parameters, gradients and optimizer"
    if row.peak_memory_bytes and baseline is not None and baseline.peak_memory_bytes:
        text += f", {row.peak_memory_bytes / baseline.peak_memory_bytes:.2f} x its peak memory"
    return text + "."
