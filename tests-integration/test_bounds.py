"""A core outside the bounds that a package gives makes `uv pip check` fail, for every package that requires core."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "packages" / "precision-core"
BOUND = re.compile(r'"(precision-core>=[\d.]+,<([\d.]+))"')
SIBLINGS = {
    path.parent.name: BOUND.findall(path.read_text()) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
SIBLINGS.pop(CORE.name)

pytestmark = pytest.mark.skipif(not shutil.which("uv"), reason="needs uv on the PATH: it builds, installs and checks")


def uv(*arguments: object, cwd: Path, code: int = 0) -> str:
    done = subprocess.run(["uv", *map(str, arguments)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def wheel(package: Path, folder: Path, version: str | None = None) -> Path:
    """Builds a package's wheel, on demand with another version."""
    source = shutil.copytree(package, folder / "source", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    if version:
        project = source / "pyproject.toml"
        project.write_text(re.sub(r'(?m)^version = ".*"', f'version = "{version}"', project.read_text(), count=1))
    uv("build", "--wheel", "--no-sources", "--out-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def complaints(folder: Path, *wheels: Path) -> list[str]:
    """Installs the wheels, and nothing that they require, and returns what uv then says of core's version."""
    uv("venv", "--python", sys.executable, "venv", cwd=folder)
    uv("pip", "install", "--python", "venv/bin/python", "--no-deps", *wheels, cwd=folder)
    said = uv("pip", "check", "--python", "venv/bin/python", cwd=folder, code=1)  # torch, for one, is not there
    assert "The package `precision-core` requires `torch" in said
    return [line.strip() for line in said.splitlines() if "requires `precision-core" in line]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(CORE, tmp_path_factory.mktemp("core"))


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_a_core_outside_the_bounds_is_noticed(sibling: str, core: Path, tmp_path: Path) -> None:
    ((bounds, above),) = SIBLINGS[sibling]  # every package gives both, and once
    version = f"{above}.0" if above.count(".") == 1 else above
    folders = [tmp_path / name for name in ("sibling", "newer", "right", "wrong")]
    for folder in folders:
        folder.mkdir()
    ours, newer = wheel(ROOT / "packages" / sibling, folders[0]), wheel(CORE, folders[1], version)
    assert newer.name.startswith(f"precision_core-{version}-")

    assert complaints(folders[2], core, ours) == []
    (line,) = complaints(folders[3], newer, ours)
    assert f"The package `{sibling}` requires `{bounds}`, but `{version}` is installed" in line
