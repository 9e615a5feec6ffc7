"""Codes of errors: in messages, in core's table and on the site's page, each in all three."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from precision_core.errors import CODES

ROOT = Path(__file__).parents[2]
CODE = re.compile(r" \[([a-z0-9]+(?:-[a-z0-9]+)+)\]$")


def codes_in_messages() -> set[str]:
    """Returns the codes at the end of string literals in all packages' sources."""
    found = set()
    for path in ROOT.glob("packages/*/src/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(CODE.findall(node.value))
    return found


def test_each_code_is_in_a_message_and_in_the_table() -> None:
    assert codes_in_messages() == set(CODES)
    assert 40 <= len(CODES) <= 60


def test_each_code_has_a_section_and_each_section_a_code() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    sections = re.split(r"^### (.+)$", page, flags=re.MULTILINE)[1:]
    texts = dict(zip(sections[::2], sections[1::2], strict=True))
    assert list(texts) == list(CODES)  # in its order, too
    assert all(text.split("\n## ")[0].strip() for text in texts.values())


def test_lines_are_short() -> None:
    assert all(len(line) < 100 and not line.endswith(".") for line in CODES.values())
