"""Imports go downwards: a module takes from those of the levels before its own, and of its own package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import precision_deepspeed

FOLDER = Path(precision_deepspeed.__file__).parent
LEVELS = (
    ("support", "vendor", "direct", "scaler", "arguments", "checkpoints"),
    ("config", "order", "engine"),
    ("plain_engine", "zero_engine", "binding", "plugin"),
    ("zero3_engine",),
    ("engines",),
    ("strategy",),
    ("__init__",),
)
IN_CHECKPOINTS = (("names", "pickles"), ("saved",), ("placing", "export"), ("folder",), ("__init__",))


def imported(text: str, package: str) -> set[str]:
    """Returns the parts of `package` that code imports when it runs: not what type checkers alone see."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return {name.removeprefix(f"{package}.").partition(".")[0] for name in names if name.startswith(f"{package}.")}


@pytest.mark.parametrize(
    ("package", "folder", "levels"),
    [
        ("precision_deepspeed", FOLDER, LEVELS),
        ("precision_deepspeed.checkpoints", FOLDER / "checkpoints", IN_CHECKPOINTS),
    ],
)
def test_imports_go_downwards(package: str, folder: Path, levels: tuple[tuple[str, ...], ...]) -> None:
    level = {part: number for number, parts in enumerate(levels) for part in parts}
    paths = {path: path.relative_to(folder).parts[0].removesuffix(".py") for path in folder.rglob("*.py")}
    assert {*paths.values()} == level.keys()
    assert not [
        (part, other)
        for path, part in paths.items()
        for other in imported(path.read_text(), package) & level.keys() - {part}
        if level[other] >= level[part]
    ]


def test_what_is_outside_imports_what_checkpoints_lists() -> None:
    from precision_deepspeed import checkpoints

    paths = FOLDER.glob("*.py")
    taken = {name for path in paths for name in imported(path.read_text(), "precision_deepspeed.checkpoints")}
    assert taken - {"folder"} == set(checkpoints.__all__)


def test_the_scan_finds() -> None:
    text = (
        "if TYPE_CHECKING:\n    from a.b import c\ndef f():\n    from a.d.e import g\nfrom a import h\nfrom ab import i"
    )
    assert imported(text, "a") == {"d", "h"}
