"""ci/release.py as a command: what it refuses, and what it builds."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROJECT = """
[project]
name = "precision-{name}"
version = "{version}"
requires-python = ">=3.10"
dependencies = [{requires}]
[build-system]
requires = ["hatchling>=1.27,<1.32"]
build-backend = "hatchling.build"
"""
ROOT = """
[project]
name = "root"
version = "0"
requires-python = ">=3.10"
[tool.uv]
package = false
[tool.uv.workspace]
members = ["packages/*"]
[tool.uv.sources]
precision-core = { workspace = true }
"""


def version(repo: Any, number: str, name: str = "core", requires: str = "") -> None:
    text = PROJECT.format(name=name, version=number, requires=requires)
    repo.write(f"packages/precision-{name}/pyproject.toml", text=text)


def changelog(repo: Any, text: str, name: str = "core") -> None:
    repo.write(f"packages/precision-{name}/CHANGELOG.md", text=f"# Changelog\n\n{text}")


@pytest.fixture(scope="module")
def original(make_empty: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    empty = make_empty(tmp_path_factory.mktemp("original"))
    empty.write("pyproject.toml", text=ROOT)
    empty.write(".gitignore", text="dist/\n")
    version(empty, "0.1.0")
    version(empty, "0.3.0", "lab", '"precision-core>=0.1,<0.2", "rich"')
    changelog(empty, "## 0.1.0 (2026-02-28)\n\n- First.\n")
    changelog(empty, "## 0.3.0 (2026-03-01)\n\n- Third.\n\n## 0.2.0 (2026-02-28)\n\n- Second.\n", "lab")
    for name in ("core", "lab"):
        empty.write(f"packages/precision-{name}/src/precision_{name}/__init__.py", text="")
    empty.commit()
    return empty


@pytest.fixture
def repo(original: Any, tmp_path: Path) -> Any:
    return original.copied(tmp_path / "repository")


def refused(repo: Any, package: str = "precision-core") -> str:
    said: str = repo.error("release.py", package)
    assert not (repo.root / "dist").exists()
    return said.strip()


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "what"), [("precision-cor", "no package is named precision-cor"), ("", "name a package")]
)
def test_an_unknown_package(repo: Any, name: str, what: str) -> None:
    assert refused(repo, name) == f"release: {what}; there are: precision-core, precision-lab"


@pytest.mark.parametrize("path", ["packages/precision-core/src/precision_core/__init__.py", "new file", ".gitignore"])
@pytest.mark.parametrize("staged", [False, True])
def test_a_tree_that_is_not_clean(repo: Any, path: str, staged: bool) -> None:
    repo.write(path)
    if staged:
        repo.git("add", "--all")
    said = refused(repo)
    assert "the tree is not clean; commit, or remove:\n" in said and path in said


TOP = "CHANGELOG.md: the top heading is `## {}`, but this release's is `## 0.1.0 (YYYY-MM-DD)`"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "CHANGELOG.md has no heading: it needs `## 0.1.0 (YYYY-MM-DD)`"),
        ("## Unreleased\n\n- First.\n", TOP.format("Unreleased")),
        ("## Unreleased\n\n- Later.\n\n## 0.1.0 (2026-02-28)\n\n- First.\n", TOP.format("Unreleased")),
        ("## 0.1.0\n\n- First.\n", TOP.format("0.1.0")),
        ("## 0.1.0 (soon)\n\n- First.\n", TOP.format("0.1.0 (soon)")),
        ("## 0.1.0.1 (2026-02-28)\n\n- First.\n", TOP.format("0.1.0.1 (2026-02-28)")),
        ("## 0.1.00 (2026-02-28)\n\n- First.\n", TOP.format("0.1.00 (2026-02-28)")),
        ("## 0x1x0 (2026-02-28)\n\n- First.\n", TOP.format("0x1x0 (2026-02-28)")),
        ("## 0.0.9 (2026-02-28)\n\n- First.\n", TOP.format("0.0.9 (2026-02-28)")),
        ("## 0.1.0 (2026-02-30)\n\n- First.\n", "CHANGELOG.md: `## 0.1.0 (2026-02-30)` has no day of the calendar"),
        ("## 0.1.0 (2026-02-28)\n\n", "CHANGELOG.md: nothing stands under `## 0.1.0 (2026-02-28)`"),
        ("## 0.1.0 (2026-02-28)\n\n## 0.0.9\n\n- Old.\n", "CHANGELOG.md: nothing stands under `## 0.1.0 (2026-02-28)`"),
    ],
)
def test_a_heading_that_is_not_this_releases(repo: Any, text: str, what: str) -> None:
    changelog(repo, text)
    repo.git("commit", "--all", "--quiet", "--allow-empty", "--message", "changelog")
    assert refused(repo) == f"release: {what}"


def test_no_changelog(repo: Any) -> None:
    repo.git("rm", "--quiet", "packages/precision-core/CHANGELOG.md")
    repo.commit()
    assert "CHANGELOG.md has no heading" in refused(repo)


@pytest.mark.parametrize("annotated", [[], ["--annotate", "--message", "x"]])
def test_a_tag_that_says_another_version(repo: Any, annotated: list[str]) -> None:
    repo.git("tag", *annotated, "precision-core-v0.2.0")
    assert refused(repo) == "release: HEAD is tagged precision-core-v0.2.0, but pyproject.toml says 0.1.0"
    repo.git("tag", *annotated, "precision-core-v0.1.0")  # a second one that is right does not help
    assert "HEAD is tagged precision-core-v0.2.0" in refused(repo)


@pytest.mark.parametrize("annotated", [[], ["--annotate", "--message", "x"]])
def test_a_tag_on_another_commit(repo: Any, annotated: list[str]) -> None:
    repo.git("tag", *annotated, "precision-core-v0.1.0")
    tagged = repo.git("rev-parse", "--short", "HEAD")
    repo.write("README.md")
    repo.commit()
    what = f"precision-core-v0.1.0 exists already, on another commit ({tagged}): raise the version in pyproject.toml"
    assert refused(repo) == f"release: {what}"


def test_a_version_that_is_no_release(repo: Any) -> None:
    version(repo, "0.1.0.dev0")
    changelog(repo, "## 0.1.0.dev0 (2026-02-28)\n\n- First.\n")
    repo.commit()
    assert refused(repo) == "release: precision-core: '0.1.0.dev0' is no version of the form X.Y.Z"


# ---------------------------------------------------------------- built


@pytest.mark.skipif(not shutil.which("uv"), reason="needs uv on the PATH: it builds")
def test_a_release_and_then_its_tag(repo: Any) -> None:
    hidden = "packages/precision-lab/src/precision_lab/hidden.py"
    repo.write(".git/info/exclude", text="hidden.py\n")  # clean to git; the build reads .gitignore only
    repo.write(hidden)
    repo.git("tag", "precision-core-v0.2.0")  # another package's tags say nothing about this one
    head = repo.git("rev-parse", "--short", "HEAD")
    names = ["precision_lab-0.3.0-py3-none-any.whl", "precision_lab-0.3.0.tar.gz"]

    lines = repo.script("release.py", "precision-lab").splitlines()
    wheel, sdist = (repo.root / "dist" / name for name in names)
    assert lines == [
        f"precision-lab 0.3.0 from {head}: not tagged yet",
        f"{hashlib.sha256(wheel.read_bytes()).hexdigest()}  dist/{wheel.name}",
        f"{hashlib.sha256(sdist.read_bytes()).hexdigest()}  dist/{sdist.name}",
        "next:",
        "  see that users can get precision-core>=0.1,<0.2",
        "  nox -s dist -- precision-lab",
        f"  git tag -a precision-lab-v0.3.0 -m 'precision-lab 0.3.0' {head}",
        "  git push origin precision-lab-v0.3.0",
        f"  uv publish dist/{wheel.name} dist/{sdist.name}",
    ]
    assert sorted(path.name for path in (repo.root / "dist").iterdir()) == names
    with zipfile.ZipFile(wheel) as built, tarfile.open(sdist) as source:
        assert "precision_lab/__init__.py" in built.namelist()
        assert not any("hidden" in name for name in [*built.namelist(), *source.getnames()])

    repo.git("tag", "--annotate", "--message", "x", "precision-lab-v0.3.0")
    again = repo.script("release.py", "precision-lab", "--out", str(repo.root.parent / "elsewhere")).splitlines()
    assert again[0] == f"precision-lab 0.3.0 from {head}: tagged precision-lab-v0.3.0"
    assert [line.split()[0] for line in again[1:3]] == [line.split()[0] for line in lines[1:3]]  # the same bytes
    assert not any("git tag" in line for line in again)
