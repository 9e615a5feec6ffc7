"""A core outside the bounds that a package gives makes `uv pip check` fail, for every package that requires core."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from precision_core.support import KNOWN

ROOT = Path(__file__).parents[1]
CORE = ROOT / "packages" / "precision-core"
BOUND = re.compile(r'"(precision-core>=[\d.]+,<([\d.]+))"')
SIBLINGS = {
    path.parent.name: BOUND.findall(path.read_text()) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
SIBLINGS.pop(CORE.name)


def test_what_a_hint_says_to_install_is_a_package_of_the_checkout() -> None:
    extras = {extra for known in KNOWN.values() for extra in known}
    assert extras and {f"precision-{extra}" for extra in extras} <= SIBLINGS.keys()


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


def complaints(folder: Path, *wheels: Path) -> dict[str, str]:
    """Installs the wheels, and nothing that they require, and returns what uv then says of core's version: by whom."""
    uv("venv", "--python", sys.executable, "venv", cwd=folder)
    uv("pip", "install", "--python", "venv/bin/python", "--no-deps", *wheels, cwd=folder)
    said = uv("pip", "check", "--python", "venv/bin/python", cwd=folder, code=1)  # torch, for one, is not there
    assert "The package `precision-core` requires `torch" in said
    lines = [line.strip() for line in said.splitlines() if "requires `precision-core" in line]
    found = {line.split("`")[1]: line for line in lines}
    assert len(found) == len(lines)
    return found


def first_above(sibling: str) -> tuple[str, str]:
    """Returns the bounds that a package gives, and the first version of core that is above them."""
    ((bounds, above),) = SIBLINGS[sibling]  # every package gives both, and once
    return bounds, f"{above}.0" if above.count(".") == 1 else above


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_both_bounds_are_given_once(sibling: str) -> None:
    assert first_above(sibling)


BUILT = "precision-lab"
OTHERS = [name for name in SIBLINGS if name != BUILT]


@pytest.mark.skipif(not shutil.which("uv"), reason="needs uv on the PATH: it builds, installs and checks")
@pytest.mark.parametrize("names", [[BUILT], pytest.param(OTHERS, marks=pytest.mark.full)], ids=["one", "the others"])
def test_a_core_outside_the_bounds_is_noticed(names: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    make = tmp_path_factory.mktemp
    ours = [wheel(ROOT / "packages" / name, make(name)) for name in names]
    assert complaints(make("right"), wheel(CORE, make("core")), *ours) == {}
    for version in {first_above(name)[1] for name in names}:
        newer = wheel(CORE, make("newer"), version)
        assert newer.name.startswith(f"precision_core-{version}-")
        said = complaints(make("wrong"), newer, *ours)
        for name in names:
            bounds, above = first_above(name)
            if above == version:
                assert f"The package `{name}` requires `{bounds}`, but `{version}` is installed" in said[name]
