"""All rules: each reads what was seen, and yields findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from precision_lab.auditing import (
    rules_asked,
    rules_autocast,
    rules_casts,
    rules_checkpoint,
    rules_compute,
    rules_islands,
    rules_loop,
    rules_loss,
    rules_model,
    rules_scaler,
    rules_schedule,
    rules_state,
    rules_switches,
    rules_update,
    rules_values,
)
from precision_lab.auditing.finding import Finding, worst_first
from precision_lab.auditing.record import Record

Rule = Callable[[Record], Iterator[Finding]]

RULES: tuple[Rule, ...] = (
    *rules_asked.RULES,
    *rules_scaler.RULES,
    *rules_update.RULES,
    *rules_loss.RULES,
    *rules_loop.RULES,
    *rules_schedule.RULES,
    *rules_autocast.RULES,
    *rules_casts.RULES,
    *rules_checkpoint.RULES,
    *rules_state.RULES,
    *rules_values.RULES,
    *rules_compute.RULES,
    *rules_islands.RULES,
    *rules_model.RULES,
    *rules_switches.RULES,
)


def findings_of(record: Record) -> list[Finding]:
    """Returns what the rules find, worst first."""
    return worst_first([finding for rule in RULES for finding in rule(record)])
