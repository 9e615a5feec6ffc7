"""Each example's `main`, as its command line calls it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    """Returns the module in examples/NAME.py; skips where something that it imports is not installed."""
    spec = importlib.util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"examples/{name}.py needs {error.name}")
    return module


def run(name: str, *arguments: str) -> Any:
    """Returns what `python examples/NAME.py ARGUMENTS` computes; a function of a module, so that ranks can run it."""
    return load(name).main(list(arguments))


@pytest.fixture
def example() -> Callable[..., Any]:
    return run
