"""The table of rules, and the README's table of what they find."""

from __future__ import annotations

import re
from pathlib import Path

import precision_lab.auditing
from precision_lab.auditing.finding import LEVELS, Finding, Remedy, grouped, worst_first
from precision_lab.auditing.record import Record
from precision_lab.auditing.rules import RULES, findings_of

SOURCES = sorted(Path(precision_lab.auditing.__file__).parent.glob("rules_*.py"))
README = Path(__file__).parents[2] / "README.md"


def codes() -> set[str]:
    text = "".join(path.read_text("utf-8") for path in SOURCES)
    return set(re.findall(r'Finding\(\s*"([a-z0-9-]+)"', text))


def test_the_readme_lists_each_code_and_no_other() -> None:
    listed = re.findall(
        r"^\| `([a-z0-9-]+)` \|", README.read_text("utf-8").split("## precision audit")[1], re.MULTILINE
    )
    assert set(listed) == codes() and len(listed) == len(set(listed)) and len(listed) > 50


def test_nothing_seen_is_nothing_found() -> None:
    assert findings_of(Record()) == []
    assert len(set(RULES)) == len(RULES)


def test_worst_first_and_once() -> None:
    remedy = Remedy("do", "ours", lightning="theirs")
    info, error = (Finding(code, level, "what", "why", remedy) for code, level in (("a", "info"), ("b", "error")))
    assert worst_first([info, error, info]) == [error, info]
    assert remedy.for_(["Lightning"]) == "theirs" and remedy.for_(["Accelerate"]) == remedy.for_([]) == "do"
    assert LEVELS.index("info") < LEVELS.index("error")


def test_findings_that_differ_in_their_module_alone_are_one_group() -> None:
    remedy = Remedy("do", "ours")
    layers = [Finding("a", "info", "what", "why", remedy, module=f"layers.{index}") for index in range(3)]
    ((first, others),) = grouped(layers)
    assert first is layers[0] and others == ["layers.1", "layers.2"]
