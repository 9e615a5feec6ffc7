"""What was found: where a step first goes wrong, of what, and what mends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from precision_lab.auditing.where import Line
from precision_lab.explaining.numbers import Numbers
from precision_lab.shown import Printed


@dataclass
class Remedy:
    """What to do, and what came of trying it."""

    kind: str  # exception, code, scale, data, weights
    ours: str  # what to type with precision-core
    torch: str  # in plain torch
    outcome: str = "not tried"  # "finite" or "better", which may go on after a colon; not finite, not tried, an error

    @property
    def helps(self) -> bool:
        """Whether the step was finite with it, or less of it went wrong."""
        return self.outcome.partition(":")[0] in ("finite", "better")


@dataclass
class Explanation(Printed):
    """Where a step first goes wrong; `kind` is the class of the cause, "nothing" where all is finite."""

    kind: str
    what: str  # sentences
    phase: str = ""  # forward, loss, backward, data, weights, optimizer
    operation: str = ""  # aten's name
    forward: str = ""  # in backward: of the forward operation whose gradient it is
    module: str = ""  # path; "" with an operation: the model's own forward
    line: Line | None = None
    name: str = ""  # of the input, parameter or state that was not finite
    operands: list[Numbers] = field(default_factory=list)
    output: Numbers | None = None
    reached: str = ""  # where it shows: "output 0", "the gradient of 0.weight"
    remedies: list[Remedy] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    model: str = ""  # its class
    rank: int | None = None

    @property
    def remedy(self) -> Remedy | None:
        """The first that helps."""
        return next((each for each in self.remedies if each.helps), None)

    @property
    def where(self) -> str:
        """Module and line, as far as they are known."""
        place = self.module or (f"{self.model}'s own forward" if self.operation and self.phase == "forward" else "")
        return ", ".join(str(each) for each in (place, self.line) if each)

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return {
            "version": 1,
            "kind": self.kind,
            "what": self.what,
            "phase": self.phase,
            "operation": self.operation,
            "forward": self.forward,
            "module": self.module,
            "file": self.line.file if self.line else None,
            "line": self.line.number if self.line else None,
            "text": self.line.text if self.line else "",
            "name": self.name,
            "operands": [each.as_dict() for each in self.operands],
            "output": self.output.as_dict() if self.output else None,
            "reached": self.reached,
            "remedies": [
                {"kind": each.kind, "ours": each.ours, "torch": each.torch, "outcome": each.outcome}
                for each in self.remedies
            ],
            "notes": self.notes,
            "model": self.model,
            "rank": self.rank,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Explanation:
        """Returns what `as_dict` gave; values that are missing are empty."""
        numbers = [Numbers(**{**each, "shape": tuple(each["shape"])}) for each in values.get("operands") or []]
        output = values.get("output")
        return cls(
            kind=values.get("kind", ""),
            what=values.get("what", ""),
            phase=values.get("phase", ""),
            operation=values.get("operation", ""),
            forward=values.get("forward", ""),
            module=values.get("module", ""),
            line=Line(values["file"], values.get("line") or 0, "") if values.get("file") else None,
            name=values.get("name", ""),
            operands=numbers,
            output=Numbers(**{**output, "shape": tuple(output["shape"])}) if output else None,
            reached=values.get("reached", ""),
            remedies=[Remedy(**each) for each in values.get("remedies") or []],
            notes=list(values.get("notes") or []),
            model=values.get("model", ""),
            rank=values.get("rank"),
        )

    def __rich__(self) -> Any:
        from precision_lab.explaining.shown import shown

        return shown(self)
