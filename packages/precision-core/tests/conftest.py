"""What the tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# The tests' tensors are tiny, and on a busy machine threads that wait for each other take minutes.
torch.set_num_threads(1)


@pytest.fixture
def true_modes_compile() -> None:
    """Skips where torch.compile is too old for true modes, which core refuses there."""
    if torch.__version__ < "2.12":
        pytest.skip("needs torch 2.12: older ones leave tensors created in a compiled forward in the default dtype")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a distribution for this test: its metadata, with entry points, and by choice a module's source."""

    def install(name: str, entry_points: str, module: str = "", source: str = "") -> None:
        folder = tmp_path / name
        metadata = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(entry_points)
        if module:
            (folder / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder))

    return install
