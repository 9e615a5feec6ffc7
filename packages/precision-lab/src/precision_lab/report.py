"""report.html: one file without network, to be sent on: verdict, table, curves, layers, bytes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch

from precision_core.policy import parse_dtype
from precision_lab.charts import Bar, Line, bar_rows, line_chart
from precision_lab.curves import curve, drift
from precision_lab.probe import first_excess
from precision_lab.results import REFERENCE, Comparison, Row
from precision_lab.shown import human_bytes
from precision_lab.table import comparison_texts, footnotes, notes
from precision_lab.verdict import Verdict, judge

_COLOURS = 8
_KINDS = ("params", "grads", "optimizer", "rest")


def save_report(comparison: Comparison, path: Path) -> None:
    """Writes the report of a comparison, whatever of it there is."""
    path.write_text(report(comparison), "utf-8")


def report(comparison: Comparison) -> str:
    """Returns the page."""
    verdict = judge(comparison)
    sections = [
        _verdict(comparison, verdict),
        _section("Figures", _table(comparison, verdict)),
        _section("Curves", _curves(comparison)),
        _section("Bytes by kind", _bytes(comparison)),
        _section("Layers: signal to noise, in decibels", _layers(comparison)),
    ]
    style = files("precision_lab").joinpath("report.css").read_text("utf-8")
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>precision compare: '
        f'{html.escape(verdict.headline)}</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head>"
    )
    return f"{head}<body>{''.join(sections)}</body></html>\n"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _verdict(comparison: Comparison, verdict: Verdict) -> str:
    here = comparison.environment
    what = comparison.task and Path(comparison.task).name
    facts = [
        what or f"the built-in GPT ({comparison.size})",
        f"{here['parameters']:,} parameters" if "parameters" in here else "",
        f"{comparison.steps} steps",
        f"seed {comparison.seed}",
        f"{here.get('device', '')} {here.get('device_name', '')}".strip(),
        f"torch {here['torch']}" if "torch" in here else "",
    ]
    sentences = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in verdict.sentences)
    kind = "verdict" if verdict.take else "verdict none"
    line = html.escape(" · ".join(fact for fact in facts if fact))
    return f'<p class="soft">{line}</p><div class="{kind}"><h1>{html.escape(verdict.headline)}</h1>{sentences}</div>'


def _table(comparison: Comparison, verdict: Verdict) -> str:
    columns, rows, _ = comparison_texts(comparison)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = ""
    for mode, *cells in rows:
        kind = verdict.modes.get(mode, "unknown")
        said = {"worse": " ✗", "swallows": " ✗ swallows", "safe": " ✓"}.get(kind, "")
        shown = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body += f'<tr><td class="long">{html.escape(mode)}<span class="{kind}">{said}</span></td>{shown}</tr>'
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    others = [row for row in (*comparison.rows, *comparison.repeats) if row.status != "done"]
    reasons = "".join(
        f'<p><b>{html.escape(row.label)}</b> <span class="{row.status}">{row.status}</span>: '
        f"{html.escape(row.reason)}</p>"
        for row in others
    )
    lines = [*notes(comparison), footnotes(comparison)]
    below = "".join(f'<p class="soft"><small>{html.escape(line)}</small></p>' for line in lines)
    return f"{table if rows else ''}{reasons}{below}"


def _curves(comparison: Comparison) -> str:
    rows = [row for row in comparison.rows if row.losses]
    reference = comparison.find(REFERENCE)
    losses, drifts = [], []
    for index, row in enumerate(rows):
        steps, values = curve(row)
        losses.append(Line(row.mode, steps.tolist(), values.tolist(), index % _COLOURS, row.held_out_loss))
        if reference is not None and row is not reference:
            drifts.append(Line(row.mode, steps.tolist(), drift(row, reference).tolist(), index % _COLOURS))
    figures = [
        _figure(line_chart(losses, "training loss"), "Training loss; dots: held-out loss"),
        _figure(line_chart(losses, "the end", first=0.8 * comparison.steps), "The last fifth of it, closely"),
        _figure(line_chart(drifts, "drift", logarithmic=True), "Drift from 64-true: |L - L64| / |L64|, each step"),
    ]
    key = "".join(
        f'<span><i class="k{index % _COLOURS}"></i>{html.escape(row.mode)}</span>' for index, row in enumerate(rows)
    )
    return f'<div class="key">{key}</div><div class="pair">{"".join(figures)}</div>' if rows else ""


def _figure(chart: str, caption: str) -> str:
    return f"<figure>{chart}<figcaption>{html.escape(caption)}</figcaption></figure>" if chart else ""


def _bytes(comparison: Comparison) -> str:
    bars = []
    for row in comparison.rows:
        sizes = [row.parameter_bytes, row.gradient_bytes, row.optimizer_bytes]
        if row.status != "done" or not any(sizes):
            continue
        known = [size or 0 for size in sizes]
        rest = max(0, (row.peak_memory_bytes or 0) - sum(known))
        kinds = zip(_KINDS, [*known, rest], strict=True)
        bars.append(Bar(row.mode, [(kind, size, human_bytes(size)) for kind, size in kinds]))
    key = "".join(f'<span><i class="{kind}"></i>{kind}</span>' for kind in _KINDS)
    what = '<p class="soft"><small>rest: what the peak has besides, activations and workspaces.</small></p>'
    return f'<div class="key">{key}</div>{bar_rows(bars)}{what}' if bars else ""


def _layers(comparison: Comparison) -> str:
    rows = [row for row in comparison.rows if row.noise and row.mode != REFERENCE]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name, *_ in row.noise))
    kinds = [(row, kind) for kind in (1, 2) for row in rows]
    columns = [_column(row, kind, names) for row, kind in kinds]
    head = "".join(f'<th colspan="{len(rows)}">{what}</th>' for what in ("activations", "gradients of activations"))
    modes = "".join(f"<th>{html.escape(row.mode)}</th>" for row, _ in kinds)
    body = "".join(
        f"<tr><td>{html.escape(name or '(the model)')}</td>{''.join(column[index] for column in columns)}</tr>"
        for index, name in enumerate(names)
    )
    what = (
        "One batch at the start, against the same in float64: 6 dB are one bit, float32 comes to about 140, bfloat16 "
        "to about 50, float16 to about 65; at 0 there is as much noise as signal. A frame: the first layer where noise "
        "grows four times faster than its depth explains."
    )
    table = f'<table class="heat"><thead><tr><th></th>{head}</tr><tr><th>module</th>{modes}</tr></thead>'
    missing = "".join(
        f"<p><small>{html.escape(row.mode)}: none, {html.escape(row.no_noise)}</small></p>"
        for row in comparison.rows
        if row.no_noise
    )
    scroll = f'<div class="scroll">{table}<tbody>{body}</tbody></table></div>'
    return f'<p class="soft"><small>{what}</small></p>{scroll}{missing}'


def _column(row: Row, kind: int, names: Sequence[str]) -> list[str]:
    found = [(name, output if kind == 1 else gradient) for name, output, gradient in row.noise]
    values = dict(found)
    ordered = found if kind == 1 else found[::-1]  # gradients come from the end
    excess = first_excess([value for _, value in ordered], _roundoff(row))
    marked = None if excess is None else ordered[excess][0]
    return [_cell(values.get(name), name == marked) for name in names]


def _roundoff(row: Row) -> float:
    """Returns half of the distance between 1 and the next number in what the mode computes in."""
    return torch.finfo(parse_dtype((row.policy or {}).get("compute", "float32"))).eps / 2


def _cell(value: float | None, marked: bool) -> str:
    if value is None:
        return '<td class="empty">-</td>'
    # from red at 0 over yellow to green at 60 and blue from 120 on: hues that stay apart in grey and for most eyes
    share = max(0.0, min(1.0, value / 140))
    colour = f"hsl({round(8 + 210 * share)} 65% {round(62 + 12 * share)}%)"
    return f'<td style="background:{colour}"{" class=marked" if marked else ""}>{value:.0f}</td>'
