"""How results show themselves: printed, in a terminal's Python, and in a notebook as HTML or Markdown."""

from __future__ import annotations

import html
import io
from typing import Any


class Shown:
    """A result whose class has `table()`: (heading of its columns, rows of texts, lines that follow)."""

    def table(self) -> tuple[list[str], list[list[str]], list[str]]:
        """Returns the column names, a row of texts each, and lines of text below."""
        from precision_lab.table import comparison_texts

        texts: Any = comparison_texts(self)  # type: ignore[arg-type]
        return texts

    def __repr__(self) -> str:
        columns, rows, lines = self.table()
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        text = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in [columns, *rows]
        ]
        return "\n".join(line.rstrip() for line in [*text, *lines])

    def _repr_markdown_(self) -> str:
        columns, rows, lines = self.table()
        text = ["| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *_escaped(rows)]]
        return "\n".join([*text, "", *lines])

    def _repr_html_(self) -> str:
        columns, rows, lines = self.table()
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        below = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


class Printed:
    """A result whose class has `__rich__`: `print` shows the same, in 100 columns and without colours."""

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=100, highlight=False, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def human_bytes(number: int | None) -> str:
    """Returns `number` with three digits and a binary unit, "-" for None."""
    if number is None:
        return "-"
    value = float(number)
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


def _escaped(rows: list[list[str]]) -> list[list[str]]:
    return [[cell.replace("|", "\\|") for cell in row] for row in rows]
