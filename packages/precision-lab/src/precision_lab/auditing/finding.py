"""A finding: what is wrong in a loop, where, why it matters, how sure that is, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from precision_lab.auditing.where import Line

LEVELS = ("info", "warning", "error")
"""error: the result is wrong, or will be. warning: it costs accuracy, memory or time that nobody asked for."""


@dataclass(frozen=True)
class Remedy:
    """What to do, in the words of the library that runs the loop; `torch` where that has no words of its own."""

    torch: str
    ours: str
    lightning: str = ""
    accelerate: str = ""
    transformers: str = ""
    trainer: str = ""  # Lightning's Trainer, where that is told otherwise than its Fabric
    deepspeed: str = ""

    def for_(self, libraries: list[str], host: str = "") -> str:
        """Returns the text for the first of the libraries that has one, by the class that the user made of it."""
        lightning = self.lightning
        if host == "Trainer":
            lightning = self.trainer or lightning.replace("Fabric(", "Trainer(")
        texts = {
            "Lightning": lightning,
            "DeepSpeed": self.deepspeed,
            "Accelerate": self.accelerate,
            "transformers": self.transformers,
            "TRL": self.transformers,
            "precision": self.ours,
        }
        # transformers' Trainer trains through Accelerate: the user types transformers' arguments.
        order = sorted(libraries, key=lambda name: name not in ("transformers", "TRL"))
        found = next((texts[name] for name in order if texts.get(name)), self.torch)
        return found.replace("TrainingArguments(", f"{host}(") if host.endswith(("Config", "Arguments")) else found


@dataclass(frozen=True)
class Finding:
    """One finding."""

    code: str
    level: str  # one of LEVELS
    what: str  # one sentence, with the figures seen
    why: str
    remedy: Remedy
    line: Line | None = None
    module: str = ""
    sure: str = "certain"  # certain: seen to happen; likely: by what was seen, with one assumption, which `why` names

    @property
    def where(self) -> str:
        """Module and line, as far as they are known."""
        return ", ".join(str(each) for each in (self.module, self.line) if each)


def worst_first(findings: list[Finding]) -> list[Finding]:
    """Returns the findings by level, else in their order; equal ones of one line and module once."""
    once: dict[tuple[str, str, Line | None], Finding] = {}
    for each in findings:
        once.setdefault((each.code, each.module, each.line), each)
    return sorted(once.values(), key=lambda each: -LEVELS.index(each.level))


def grouped(findings: list[Finding]) -> list[tuple[Finding, list[str]]]:
    """Returns the first of the findings that differ in their module alone, with the modules of the others."""
    groups: dict[tuple[str, str, Line | None], tuple[Finding, list[str]]] = {}
    for each in findings:
        first, others = groups.setdefault((each.code, each.level, each.line), (each, []))
        if each is not first:
            others.append(each.module)
    return list(groups.values())
