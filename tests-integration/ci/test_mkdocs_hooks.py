"""What the site's hooks make of signatures: a reader has to see which arguments are by keyword alone."""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from precision_core import Fabric, MixedPrecision

SCRIPT = Path(__file__).parents[2] / "ci" / "mkdocs_hooks.py"
spelled = runpy.run_path(str(SCRIPT))["spelled"]
KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: "positional-only",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional or keyword",
    inspect.Parameter.VAR_POSITIONAL: "variadic positional",
    inspect.Parameter.KEYWORD_ONLY: "keyword-only",
    inspect.Parameter.VAR_KEYWORD: "variadic keyword",
}
"""Python's kinds -> griffe's names of them."""


def only_positional(a, /): ...
def both(a, /, b=1, *, c, d=2): ...
def variadic(a, *rest, c=3, **others): ...
def nothing(): ...


@pytest.mark.parametrize(
    "function", [only_positional, both, variadic, nothing, Fabric, Fabric.clip_gradients, MixedPrecision, Fabric.load]
)
def test_a_signature_has_its_stars_and_slashes(function: Callable[..., Any]) -> None:
    parameters = [each.replace(annotation=each.empty) for each in inspect.signature(function).parameters.values()]
    expected = inspect.Signature([each for each in parameters if each.name != "self"])
    given = [(p.name, KINDS[p.kind], None if p.default is p.empty else repr(p.default)) for p in parameters]
    assert f"({', '.join(spelled(given))})" == str(expected)
