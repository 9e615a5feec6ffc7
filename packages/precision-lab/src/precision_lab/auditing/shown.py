"""An audit's report on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from precision_lab.auditing.finding import grouped
from precision_lab.auditing.ledger import PARTS
from precision_lab.auditing.observed import sentence
from precision_lab.auditing.phrases import listed

if TYPE_CHECKING:
    from precision_lab.auditing.report import Report

_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def shown(report: Report) -> RenderableType:
    """Returns findings, ledger and what was not seen, for rich; right in 80 columns and without colours."""
    record = report.record
    by = f", run by {' and '.join(record.libraries)}" if record.libraries else ""
    steps = f"{record.steps} training step{'s' * (record.steps != 1)}"
    parts: list[RenderableType] = [Text(f"{steps} on {', '.join(record.devices) or 'no device'}{by}"), Text()]
    if text := sentence(record):
        parts += [Text(text), Text()]
    if not report.findings:
        parts += [Text("Nothing found."), Text()]
    for finding, others in grouped(report.findings):
        head = Text.assemble((finding.level, _STYLES[finding.level]), f" [{finding.code}] {finding.where}")
        parts.append(head)
        lines = [Text(f"{finding.what}{'' if finding.sure == 'certain' else f' ({finding.sure})'}")]
        if others:
            lines.append(Text(f"the same in {listed(others)}"))
        if finding.line is not None and finding.line.text:
            lines.append(Text(f"    {finding.line.text}", style="cyan", no_wrap=True, overflow="ellipsis"))
        lines.append(Text(f"why: {finding.why}"))
        remedy = finding.remedy.for_(record.libraries, record.host)
        lines.append(Text(f"do:  {remedy}"))
        if remedy != finding.remedy.ours:
            lines.append(Text(f"or:  {finding.remedy.ours}"))
        parts += [*(Padding(line, (0, 0, 0, 2)) for line in lines), Text()]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part", no_wrap=True)
    table.add_column("as observed")
    for part in PARTS:
        if part in report.ledger.parts:
            table.add_row(part, dtypes_text(report.ledger.parts[part], part))
    parts.append(table)
    if report.unseen:
        parts += [Text(), Text("Not seen:"), *(Padding(Text(text), (0, 0, 0, 2)) for text in report.unseen)]
    return Group(*parts)


def dtypes_text(row: dict[str, int], part: str) -> str:
    """Returns the dtypes of a part with their bytes, most bytes first."""
    if part in ("loss", "outputs"):
        return ", ".join(sorted(row, key=lambda name: -row[name]))
    return ", ".join(f"{name} {_size(size)}" for name, size in sorted(row.items(), key=lambda each: -each[1]))


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
