"""An audit's report as a page: one file without network, to be sent on."""

from __future__ import annotations

import html
from importlib.resources import files
from pathlib import Path

from precision_lab.auditing.finding import LEVELS, Finding, grouped
from precision_lab.auditing.ledger import PARTS
from precision_lab.auditing.observed import sentence
from precision_lab.auditing.phrases import listed
from precision_lab.auditing.report import Report
from precision_lab.auditing.shown import dtypes_text

_LEVEL_CLASS = {"error": "worse", "warning": "warned", "info": "soft"}
_STYLE = (
    ".warned { color: var(--m2); } .finding { margin: 18px 0; } pre { margin: 6px 0; overflow-x: auto; }"
    "table.plain td, table.plain th { text-align: left; } table.plain th { white-space: normal; }"
)


def write_page(report: Report, path: str, script: str) -> None:
    """Writes the page; raises `OSError` where that cannot be done."""
    Path(path).write_text(page(report, script), "utf-8")


def page(report: Report, script: str) -> str:
    """Returns the page: what was found first, then the ledger, in all and per module."""
    counts = [sum(each.level == level for each in report.findings) for level in LEVELS[::-1]]
    words = [_counted(level, count) for level, count in zip(LEVELS[::-1], counts, strict=True) if count]
    headline = ", ".join(words) or "nothing found"
    sections = [
        _head(report, script, headline, clean=not (counts[0] or counts[1])),
        _section("Findings", "".join(_finding(report, each, others) for each, others in grouped(report.findings))),
        _section("As observed", _parts(report)),
        _section("Per module", _modules(report)),
        _section("Not seen", "".join(f"<p>{html.escape(text)}</p>" for text in report.unseen)),
    ]
    style = files("precision_lab").joinpath("report.css").read_text("utf-8")
    top = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>precision audit: '
        f'{html.escape(headline)}</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}{_STYLE}</style></head>"
    )
    return f"{top}<body>{''.join(sections)}</body></html>\n"


def _counted(level: str, count: int) -> str:
    return f"{count} {level}{'s' * (count != 1 and level != 'info')}"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _head(report: Report, script: str, headline: str, clean: bool) -> str:
    record = report.record
    facts = [
        Path(script).name,
        f"{record.steps} training step{'s' * (record.steps != 1)}",
        " and ".join(record.devices),
        f"run by {' and '.join(record.libraries)}" if record.libraries else "",
    ]
    line = html.escape(" · ".join(fact for fact in facts if fact))
    kind = "verdict" if clean else "verdict none"
    said = html.escape(sentence(record))
    title = html.escape(headline[0].upper() + headline[1:])
    return f'<p class="soft">{line}</p><div class="{kind}"><h1>{title}</h1><p>{said}</p></div>'


def _finding(report: Report, finding: Finding, others: list[str]) -> str:
    remedy = finding.remedy.for_(report.record.libraries, report.record.host)
    sure = "" if finding.sure == "certain" else f" ({finding.sure})"
    same = html.escape(f"; the same in {listed(others)}") if others else ""
    source = f"<pre>{html.escape(finding.line.text)}</pre>" if finding.line and finding.line.text else ""
    ours = f"<p><b>or</b> {html.escape(finding.remedy.ours)}</p>" if remedy != finding.remedy.ours else ""
    return (
        f'<div class="finding"><p><b class="{_LEVEL_CLASS[finding.level]}">{finding.level}</b> '
        f'<b>{html.escape(finding.code)}</b> <span class="soft">{html.escape(finding.where)}</span></p>'
        f"<p>{html.escape(finding.what)}{sure}{same}</p>{source}"
        f'<p class="soft">{html.escape(finding.why)}</p><p><b>do</b> {html.escape(remedy)}</p>{ours}</div>'
    )


def _parts(report: Report) -> str:
    rows = [
        f'<tr><td>{part}</td><td class="long">{html.escape(dtypes_text(report.ledger.parts[part], part))}</td></tr>'
        for part in PARTS
        if part in report.ledger.parts
    ]
    what = (
        '<p class="soft"><small>Bytes: of what is kept, those kept at the end; of products, norms, softmax and '
        "reductions, those of all results that the observed steps made.</small></p>"
    )
    head = "<thead><tr><th>part</th><th></th></tr></thead>"
    table = f'<table class="plain">{head}<tbody>{"".join(rows)}</tbody></table>'
    return f'{what}<div class="scroll">{table}</div>' if rows else ""


def _modules(report: Report) -> str:
    shown = [part for part in PARTS if any(part in parts for name, parts in report.ledger.modules.items() if name)]
    head = "".join(f"<th>{part}</th>" for part in shown)
    body = ""
    for name in sorted(report.ledger.modules, key=_natural):
        parts = report.ledger.modules[name]
        cells = "".join(f"<td>{html.escape(', '.join(_sorted(parts.get(part, {}))) or '')}</td>" for part in shown)
        label = name or "(outside of modules)"
        kind = report.record.modules.get(name, "")
        body += f'<tr><td>{html.escape(label)} <span class="soft">{html.escape(kind)}</span></td>{cells}</tr>'
    table = f'<table class="plain"><thead><tr><th>module</th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>' if body else ""


def _sorted(row: dict[str, int]) -> list[str]:
    return sorted(row, key=lambda name: -row[name])


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]
