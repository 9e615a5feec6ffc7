"""The vendor's library is asked for its version once, where it is loaded; what another release is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from precision_te import TransformerEnginePrecision, restore
from precision_te.vendor import library


@pytest.mark.parametrize("found", ["2.20", "2.20.0", "2.20.2", "2.20.0+1a2b3c4", "2.20.0.dev0+1a2b"])
def test_its_release_may_come_from_wheels_or_from_source(found: str) -> None:
    library.check_version(found)


@pytest.mark.parametrize("found", ["2.2", "2.2.0", "2.19.1", "2.21.0", "2.200", "3.0", "12.20.1", "main", ""])
def test_another_release_is_refused_with_both_versions_and_the_way_out(found: str) -> None:
    with pytest.raises(
        ImportError,
        match=rf"Transformer Engine {found} is installed, and this precision-te is written for 2\.20: install torch "
        r"first.*transformer-engine\[core_cu13,pytorch\]>=2\.20,<2\.21.*; on this machine "
        r'precision="fp8-reference".* \[no-fp8-here\]$',
    ):
        library.check_version(found)


@pytest.mark.usefixtures("no_vendor")
def test_the_version_is_checked_where_it_is_loaded_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    package.__version__ = "2.21.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ImportError, match=r"Transformer Engine 2\.21\.0 is installed"):
        TransformerEnginePrecision("bf16-mixed").convert_module(model)
    TransformerEnginePrecision("bf16-mixed", engine="reference").convert_module(model)
    assert type(restore(model)[0]) is nn.Linear  # type: ignore[index]
    package.__version__ = "2.20.2"  # type: ignore[attr-defined]
    assert library.load() is module
    monkeypatch.setattr(library, "_imported", None)  # is not called again
    assert library.load() is module


@pytest.mark.usefixtures("no_vendor")
@pytest.mark.parametrize("place", ["", "transformer_engine", "transformer_engine/wheel_lib"])
def test_a_build_from_source_runs_the_tests_of_kernels(
    find_kernels: Callable[[], bool],
    has_kernels: bool,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "transformer_engine" / "wheel_lib").mkdir(parents=True)
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "transformer_engine")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_kernels() is has_kernels  # of the recipes alone
    (tmp_path / place / "transformer_engine_torch.cpython-311-x86_64-linux-gnu.so").touch()
    assert find_kernels()


def test_the_extra_names_the_same_range() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'vendor = ["transformer-engine{library.RANGE}"' in project and library.RANGE in library.INSTALL
