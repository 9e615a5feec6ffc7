"""`python ci/lightning.py`: writes packages/precision-core/LIGHTNING.md from the table that Fabric's errors use."""

from __future__ import annotations

from pathlib import Path

from precision_core.lightning_names import ABSENT, BEHAVIOUR, DIFFERENT

PAGE = Path(__file__).parents[1] / "packages" / "precision-core" / "LIGHTNING.md"


def page() -> str:
    """Returns the page's text."""
    lines = [
        "# From Lightning Fabric",
        "",
        "Change `from lightning.fabric import Fabric` to `from precision_core import Fabric`: methods and arguments",
        "have the same names, but for those below. A test compares them with Lightning Fabric 2.6, and this page is",
        "made by `python ci/lightning.py`.",
        "",
        "## Names that are not here",
        "",
        "| Lightning's | here |",
        "| --- | --- |",
        *(f"| `fabric.{name}` | {word} |" for name, word in sorted(ABSENT.items())),
        "",
        "## Arguments that differ",
        "",
        "| method | Lightning's argument | here |",
        "| --- | --- | --- |",
    ]
    for method, arguments in sorted(DIFFERENT.items()):
        name = "Fabric(...)" if method == "__init__" else method
        lines += [f"| `{name}` | `{argument}` | {word} |" for argument, word in arguments.items()]
    return "\n".join([*lines, "", "## The same name, other behaviour", "", *(f"- {each}" for each in BEHAVIOUR), ""])


if __name__ == "__main__":
    PAGE.write_text(page())
