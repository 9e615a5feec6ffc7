"""What an audit found: the ledger, the findings, and what it could not see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from precision_lab.auditing.finding import LEVELS, Finding
from precision_lab.auditing.ledger import PARTS, Ledger, ledger_of
from precision_lab.auditing.observed import named, observed
from precision_lab.auditing.record import Record
from precision_lab.auditing.rules import findings_of
from precision_lab.shown import Printed


@dataclass
class Report(Printed):
    """Filled when the audit ends."""

    record: Record = field(default_factory=Record, repr=False)
    ledger: Ledger = field(default_factory=Ledger)
    findings: list[Finding] = field(default_factory=list)

    def fill(self, record: Record) -> None:
        """Draws the conclusions."""
        self.record, self.ledger, self.findings = record, ledger_of(record), findings_of(record)

    @property
    def unseen(self) -> list[str]:
        """What could not be observed, as sentences."""
        return self.record.unseen

    def at(self, level: str) -> list[Finding]:
        """Returns the findings at a level or above it."""
        return [each for each in self.findings if LEVELS.index(each.level) >= LEVELS.index(level)]

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return {
            "version": 1,
            "steps": self.record.steps,
            "devices": self.record.devices,
            "libraries": self.record.libraries,
            "policy": observed(self.record),
            "mode": named(observed(self.record)),
            "ledger": {part: self.ledger.parts[part] for part in PARTS if part in self.ledger.parts},
            "states": self.ledger.states,
            "modules": self.ledger.modules,
            "findings": [
                {
                    "code": each.code,
                    "level": each.level,
                    "sure": each.sure,
                    "module": each.module,
                    "file": each.line.file if each.line else None,
                    "line": each.line.number if each.line else None,
                    "what": each.what,
                    "why": each.why,
                    "remedy": each.remedy.for_(self.record.libraries),
                    "with_precision": each.remedy.ours,
                }
                for each in self.findings
            ],
            "unseen": self.unseen,
        }

    def __rich__(self) -> Any:
        from precision_lab.auditing.shown import shown

        return shown(self)
