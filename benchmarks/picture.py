"""The picture in the root README, from a run of `precision compare`: held-out loss, and bytes, of each mode.

    nox -s compare
    python benchmarks/picture.py precision-compare/compare.json compare.svg

An SVG of text and rectangles, without fonts of its own or times. Its colours follow the reader's scheme, light or dark;
the background is the page's. Needs Python alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

PARTS = (("parameter_bytes", "parameters", "#0072B2"), ("gradient_bytes", "gradients", "#E69F00"))
PARTS += (("optimizer_bytes", "optimizer", "#009E73"),)
"""Okabe and Ito's colours, which colour-blind readers can tell apart, on white and on black."""
LEFT, LOSS, BYTES, WIDTH, ROW = 130, 250, 400, 860, 34
STYLE = """text { font: 15px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 13px; fill: #59636e }
@media (prefers-color-scheme: dark) { text { fill: #f0f6fc } .small { fill: #9198a1 } }"""


def draw(comparison: dict[str, Any]) -> str:
    """Returns the SVG of a compare.json; modes that did not finish are left out."""
    rows = [row for row in comparison["modes"] if row["status"] == "done"]
    widest = max(sum(row[key] or 0 for key, *_ in PARTS) for row in rows)
    height = 76 + ROW * len(rows)
    sizes = f"{comparison['environment']['parameters'] / 1e6:.2f} million parameters, {comparison['steps']} steps"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="Held-out loss and bytes of each precision"><style>{STYLE}</style>',
        text(0, 20, "mode"),
        text(LEFT, 20, "held-out loss"),
        text(LOSS, 20, "drift from 64-true", "small"),
        text(BYTES, 20, "MiB kept"),
    ]
    x = BYTES + 90
    for _, name, colour in PARTS:
        lines.append(f'<rect x="{x}" y="9" width="12" height="12" rx="2" fill="{colour}"/>')
        lines.append(text(x + 18, 20, name, "small"))
        x += 110
    for index, row in enumerate(rows):
        y = 36 + ROW * index
        drift = "" if row["drift"] in (None, 0) else f"{row['drift']:.0e}"
        lines += [text(0, y + 19, row["mode"]), text(LEFT, y + 19, f"{row['held_out_loss']:.3f}")]
        lines += [text(LOSS, y + 19, drift, "small")]
        x, total = BYTES, sum(row[key] or 0 for key, *_ in PARTS)
        for key, _, colour in PARTS:
            length = round((WIDTH - BYTES - 60) * (row[key] or 0) / widest)
            lines.append(f'<rect x="{x}" y="{y + 4}" width="{length}" height="20" fill="{colour}"/>')
            x += length
        lines.append(text(x + 8, y + 19, f"{total / 2**20:.1f}"))
    caption = f"A GPT of {sizes} on real text, torch {comparison['environment']['torch']}; losses in nats per byte."
    lines.append(text(0, height - 16, caption, "small"))
    return "\n".join([*lines, "</svg>\n"])


def text(x: int, y: int, value: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(value)}</text>'


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    target.write_text(draw(json.loads(source.read_text())))


if __name__ == "__main__":
    main()
