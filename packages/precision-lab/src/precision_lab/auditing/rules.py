"""All rules: each reads what was seen, and yields findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from precision_lab.auditing import rules_compute, rules_islands, rules_model, rules_scaler, rules_state, rules_values
from precision_lab.auditing.finding import Finding, worst_first
from precision_lab.auditing.record import Record

Rule = Callable[[Record], Iterator[Finding]]

RULES: tuple[Rule, ...] = (
    *rules_scaler.RULES,
    *rules_state.RULES,
    *rules_islands.RULES,
    *rules_compute.RULES,
    *rules_values.RULES,
    *rules_model.RULES,
)


def findings_of(record: Record) -> list[Finding]:
    """Returns what the rules find, worst first."""
    return worst_first([finding for rule in RULES for finding in rule(record)])
