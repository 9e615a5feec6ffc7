"""An explanation on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from precision_lab.explaining.explanation import Explanation

if TYPE_CHECKING:
    from precision_lab.explaining.symptoms import Symptoms


def shown(found: Explanation) -> RenderableType:
    """Returns an explanation for rich; right in 80 columns and without colours."""
    if found.kind == "nothing":
        return Group(Text(f"Nothing is wrong in this step: {found.what}"), *_notes(found))
    on = f" on rank {found.rank}" if found.rank is not None else ""
    head = f"First wrong{on}: {found.operation or found.name or found.kind}"
    parts: list[RenderableType] = [
        Text.assemble((head, "bold red"), f" ({found.phase})" if found.phase else "", f" {found.where}".rstrip()),
        _in(Text(found.what)),
    ]
    if found.line is not None and found.line.text:
        parts.append(_in(Text(found.line.text, style="cyan", no_wrap=True, overflow="ellipsis"), 6))
    parts += [_in(Text(f"operand: {each}")) for each in found.operands]
    if found.output is not None:
        parts.append(_in(Text(f"result:  {found.output}")))
    if found.reached:
        parts.append(_in(Text(f"shows in {found.reached}")))
    for each in found.remedies:
        parts.append(_in(Text.assemble("do:  ", (each.ours, "green" if each.helps else ""))))
        if each.torch != each.ours:
            parts.append(_in(Text(f"or:  {each.torch}")))
        parts.append(_in(Text(f"     tried: {each.outcome}" if each.outcome != "not tried" else "     not tried")))
    return Group(*parts, *_notes(found))


def _notes(found: Explanation) -> list[RenderableType]:
    return [_in(Text(f"note: {each}")) for each in found.notes]


def _in(text: RenderableType, by: int = 2) -> RenderableType:
    return Padding(text, (0, 0, 0, by))


def shown_symptoms(found: Symptoms) -> RenderableType:
    """Returns what a file tells, for rich."""
    parts: list[RenderableType] = []
    count = len(found.alarms)
    parts.append(Text(f"{found.path}: {found.steps} steps, {count or 'no'} alarm{'s' * (count != 1)}"))
    if found.first is not None:
        parts.append(Text(f"{found.first.kind}: {found.first.text}", style="bold red"))
    explained = iter(found.explanations)
    for alarm in found.alarms:
        what = alarm.get("text") or alarm.get("what") or alarm.get("alarm") or ""
        on = f", rank {alarm['rank']}" if "rank" in alarm else ""
        parts += [Text(), Text(f"step {alarm.get('step', '?')}{on}: {what}", style="bold")]
        if alarm.get("explanation"):
            parts.append(_in(shown(next(explained))))
    for finding in found.findings:
        parts += [Text(), Text(f"step {finding.get('at', '?')}: {finding['finding']}", style="bold")]
        if finding.get("explanation"):
            parts.append(_in(shown(Explanation.from_dict(finding["explanation"]))))
    if found.signs:
        parts += [Text(), Text("Signs:"), *(_in(Text(each)) for each in found.signs)]
    if found.type:
        parts += [Text(), Text("To find out, type:"), *(_in(Text(each, no_wrap=False), 4) for each in found.type)]
    return Group(*parts)
