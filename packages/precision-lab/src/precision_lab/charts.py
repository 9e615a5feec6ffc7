"""Charts of the report as SVG: lines over the steps, and stacked bars of bytes. Colours are the page's (style.css)."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40
POINTS = 240
"""Points that a line is drawn with, at most."""


@dataclass(frozen=True)
class Line:
    """One curve; `mark` is a value at the right edge, drawn as a dot. NaN and None are gaps."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int
    mark: float | None = None


def line_chart(lines: Sequence[Line], title: str, *, logarithmic: bool = False, first: float = 1.0) -> str:
    """Returns an SVG of the lines from step `first` on; "" where nothing can be drawn."""
    shown = [line for each in lines if (line := _cut(each, first, logarithmic)).steps]
    values = [value for line in shown for value in (*line.values, line.mark) if value is not None]
    steps = [step for line in shown for step in line.steps]
    if not values or not steps:
        return ""
    low, high = min(values), max(values)
    if logarithmic:
        low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
    else:
        margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
        low, high = low - margin, high + margin
    high = high if high > low else low + 1
    start, end = min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1

    def x(step: float) -> float:
        return LEFT + (step - start) / (end - start) * (WIDTH - LEFT - RIGHT - 12)

    def y(value: float) -> float:
        height = math.log10(value) if logarithmic else value
        return HEIGHT - BOTTOM - (height - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for value, text in _ticks(low, high, logarithmic):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>')
    for step in sorted({round(start + part * (end - start)) for part in (0, 0.25, 0.5, 0.75, 1)}):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">step</text>')
    for index, line in enumerate(shown):
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(line.steps, line.values, strict=True))
        width = max(1.4, 5 * 0.6**index)  # curves lie on each other: the first is wide, so that all show
        parts.append(f'<polyline class="m{line.colour}" points="{points}" stroke-width="{width:.1f}"/>')
        if line.mark is not None:
            across = WIDTH - RIGHT - 8 + 3 * (index % 3)
            parts.append(f'<circle class="m{line.colour}" cx="{across}" cy="{y(line.mark):.1f}" r="4"/>')
    return "".join([*parts, "</svg>"])


def _cut(line: Line, first: float, logarithmic: bool) -> Line:
    kept = [
        (step, value)
        for step, value in zip(line.steps, line.values, strict=True)
        if step >= first and math.isfinite(value) and (value > 0 or not logarithmic)
    ]
    stride = max(1, len(kept) // POINTS)
    kept = kept[::-stride][::-1]  # the last one always
    return Line(line.label, [step for step, _ in kept], [value for _, value in kept], line.colour, line.mark)


def _ticks(low: float, high: float, logarithmic: bool) -> list[tuple[float, str]]:
    if logarithmic:
        exponents = range(int(low), int(high) + 1, max(1, int(high - low) // 5))
        return [(10.0**exponent, f"1e{exponent}") for exponent in exponents]
    rough = (high - low) / 4
    size = 10 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
    first = math.ceil(low / step)
    digits = max(0, -math.floor(math.log10(step)))
    return [(n * step, f"{n * step:.{digits}f}") for n in range(first, math.floor(high / step) + 1)]


@dataclass(frozen=True)
class Bar:
    """Bytes of one mode by kind, in the order in which they are stacked."""

    label: str
    kinds: Sequence[tuple[str, int, str]]
    """(kind, bytes, text)"""


def bar_rows(bars: Sequence[Bar]) -> str:
    """Returns HTML: a row a bar, each kind as wide as its share of the largest bar's bytes."""
    largest = max((sum(size for _, size, _ in bar.kinds) for bar in bars), default=0)
    rows = []
    for bar in bars:
        parts = "".join(
            f'<span class="{kind}" style="width:{100 * size / largest:.2f}%" title="{kind}: {text}"></span>'
            for kind, size, text in bar.kinds
            if size and largest
        )
        said = ", ".join(f"{kind} {text}" for kind, _, text in bar.kinds)
        stack = f'<div class="stack">{parts}</div><small>{said}</small>'
        rows.append(f'<div class="bar"><b>{html.escape(bar.label)}</b>{stack}</div>')
    return "".join(rows)
