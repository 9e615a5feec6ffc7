"""What the tests share."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from precision_core.support import discovery

# The tests' tensors are tiny, and on a busy machine threads that wait for each other take minutes.
torch.set_num_threads(1)


@pytest.fixture
def true_modes_compile() -> None:
    """Skips where torch.compile is too old for true modes, which core refuses there."""
    if torch.__version__ < "2.12":
        pytest.skip("needs torch 2.12: older ones leave tensors created in a compiled forward in the default dtype")


@pytest.fixture(autouse=True)
def installed() -> Iterator[set[str]]:
    """The distributions that core discovers: those that a test adds, and of the machine's own none."""
    names: set[str] = set()

    def entry_points(**selection: Any) -> importlib.metadata.EntryPoints:
        found = importlib.metadata.entry_points(**selection)
        return importlib.metadata.EntryPoints(each for each in found if each.dist and each.dist.name in names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discovery, "entry_points", entry_points)
        yield names


@pytest.fixture
def install(tmp_path: Path, installed: set[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a distribution for this test: its metadata, with entry points, and by choice a module's source."""
    modules: dict[str, Any] = {}  # what was there under each module's name

    def install(name: str, entry_points: str, module: str = "", source: str = "") -> None:
        folder = tmp_path / name
        metadata = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(entry_points)
        if module:
            (folder / f"{module}.py").write_text(source)
            modules.setdefault(module, sys.modules.get(module))
        installed.add(name)
        monkeypatch.syspath_prepend(str(folder))

    yield install
    for module, before in modules.items():
        sys.modules.pop(module, None)
        if before is not None:  # a second import of a package would find its submodules there, and not take them in
            sys.modules[module] = before


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program of that name on the PATH that answers with this text, and notes what it was asked."""

    def install(answer: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\necho \"$@\" >> '{program}.asked'\nprintf '{answer}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)

    return install
