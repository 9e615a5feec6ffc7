"""The rules of import: downwards only, siblings through the packages' lists, and little at `import precision_core`."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import precision_core

CORE = Path(precision_core.__file__).parent
ROOT = Path(__file__).parents[3]

LEVELS = (
    ("override", "lightning_names", "compute_capability", "errors", "policy"),
    ("scaling",),
    ("hardware",),
    ("precision", "data"),
    ("strategies", "surgery"),
    ("support",),
    ("checkpoint",),
    ("saving",),
    ("fabric",),
    ("testing", "__init__"),
)
"""What imports from those before it, and from its own package."""
IN_CHECKPOINT = (
    ("error", "paths", "tree", "arrival"),
    ("agreement", "shards"),
    ("storage", "live", "background"),
    ("save", "load", "weights", "presence"),
    ("__init__",),
)


def imports(tree: ast.AST, of: str) -> Iterator[tuple[int, str, str]]:
    """Yields line, module and name of what is imported from `of` when the code runs, in functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module and re.match(rf"{of}(\.|$)", node.module):
            for alias in node.names:
                yield node.lineno, node.module, alias.name
        if isinstance(node, ast.Import):
            for alias in node.names:
                if re.match(rf"{of}(\.|$)", alias.name):
                    yield node.lineno, alias.name, ""
        yield from imports(node, of)


def level(part: str, levels: tuple[tuple[str, ...], ...]) -> int:
    return next(number for number, parts in enumerate(levels) if part in parts)


def upward(text: str, of: str, part: str, levels: tuple[tuple[str, ...], ...]) -> list[str]:
    """Returns the imports in the code of `part` that do not lead to a part before it."""
    found = []
    for line, module, name in imports(ast.parse(text), of):
        there = (module.removeprefix(of).strip(".") or name).partition(".")[0]
        known = any(there in parts for parts in levels)  # else it is a name of the package's own list
        if known and there != part and level(there, levels) >= level(part, levels):
            found.append(f"{part}:{line} {module}.{name}")
    return found


@pytest.mark.parametrize(
    ("of", "folder", "levels"),
    [("precision_core", CORE, LEVELS), ("precision_core.checkpoint", CORE / "checkpoint", IN_CHECKPOINT)],
)
def test_core_imports_downwards_only(of: str, folder: Path, levels: tuple[tuple[str, ...], ...]) -> None:
    parts = {path: path.relative_to(folder).parts[0].removesuffix(".py") for path in folder.rglob("*.py")}
    assert {*parts.values()} == {part for each in levels for part in each}
    assert not [line for path, part in parts.items() for line in upward(path.read_text(), of, part, levels)]
    lowest, highest = levels[0][0], levels[-2][0]
    text = f"def f():\n    from {of}.{highest} import x\n"
    assert upward(text, of, lowest, levels) == [f"{lowest}:2 {of}.{highest}.x"]
    assert not upward(f"if TYPE_CHECKING:\n    from {of}.{highest} import x\n", of, lowest, levels)


def outside() -> list[Path]:
    roots = [ROOT / name for name in ("packages", "examples", "benchmarks", "soak", "tests-integration", "ci")]
    return [path for root in roots for path in root.rglob("*.py") if "precision-core" not in path.parts]


def test_others_import_what_the_packages_list() -> None:
    wrong = []
    for path in outside():
        for line, module, name in imports(ast.parse(path.read_text()), "precision_core"):
            package = module.removeprefix("precision_core").strip(".")
            there = importlib.import_module(module)
            listed = getattr(there, "__all__", None) or [each for each in vars(there) if not each.startswith("_")]
            is_module = not package and (CORE / f"{name}.py").exists()
            if "." in package or (name and name not in listed and not is_module):
                wrong.append(f"{path.relative_to(ROOT)}:{line} {module}.{name}")
    assert not wrong


@pytest.mark.slow_start  # in a process that has imported nothing else
def test_importing_core_takes_what_training_needs_alone() -> None:
    code = "import sys, precision_core; print(*(each for each in sys.modules if each.startswith('precision_core.')))"
    lines = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    late = ("checkpoint", "surgery", "testing", "strategies.launch", "support.support", "support.table", "data.sharing")
    late += ("scaling.loss_scaler", "precision.model.integer_inputs")
    taken = {each.removeprefix("precision_core.") for each in lines.split()}
    taken = {each for each in taken if each.startswith(late)}
    assert taken == {"checkpoint", "checkpoint.error"}
