"""What the tests share: threads, the vendor's recipes where they are installed, and a process without its library."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from precision_te.vendor import library

# The tests' tensors are tiny, and on a busy machine threads that wait for each other take minutes.
torch.set_num_threads(1)


def _find_kernels() -> bool:
    """Whether the vendor's torch extension is there: as a distribution, or beside the package, built from source."""
    if any(distributions(name="transformer-engine-torch")):
        return True
    spec = find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        return False
    package, name = Path(spec.origin).parent, "transformer_engine_torch*.so"
    beside = (package.parent, Path(sysconfig.get_paths()["purelib"]))
    return any(package.rglob(name)) or any(any(folder.glob(name)) for folder in beside)


@pytest.fixture(scope="session")
def find_kernels() -> Callable[[], bool]:
    """The function that looks for the vendor's torch extension."""
    return _find_kernels


@pytest.fixture(scope="session")
def has_kernels() -> bool:
    """Whether the vendor's torch extension is installed; a test fails then where it does not load."""
    return _find_kernels()


@pytest.fixture(scope="session")
def vendor_recipes(has_kernels: bool) -> Any:
    """The module `transformer_engine.common.recipe`, real, also where the rest of the library is not installed."""
    if find_spec("transformer_engine") is None:
        pytest.skip("transformer-engine is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if not has_kernels:
            patch.setenv("NVTE_PROJECT_BUILDING", "1")  # what it wants to be imported without its kernels
        return library.load_recipes()


@pytest.fixture
def no_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which the vendor's library is not installed."""
    monkeypatch.setattr(library, "_loaded", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)


@pytest.fixture(scope="session")
def te(has_kernels: bool) -> Any:
    """The vendor's whole library; a test that asks for it runs where that is."""
    if not has_kernels:
        pytest.skip("Transformer Engine's torch extension is not installed; the rows vendor-cpu and -cuda have it")
    return library.load()
