"""ci/affected.py as a command: which tags a change has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PACKAGES = {"core": "", "lab": '"Precision_Core>=0.1,<0.2", "rich"', "fsdp": '"precision-core[lab]"', "te": '"torch"'}
ROWS = [*(f"precision-{name}" for name in PACKAGES), "tests-integration", "examples/kahan"]
ALL = set(ROWS)


def project(name: str, requires: str = "") -> str:
    return f'[project]\nname = "{name}"\nversion = "0.1.0"\ndependencies = [{requires}]\n'


@pytest.fixture(scope="module")
def original(make_empty: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    empty = make_empty(tmp_path_factory.mktemp("original"))
    for name, requires in PACKAGES.items():
        text = project(f"precision-{name}", requires)
        if name == "core":  # an extra names a dependant: core does not depend on it
            text += '[project.optional-dependencies]\nlab = ["precision-lab>=0.1"]\n'
        if name == "te":  # needs lab, but for its tests only
            text += '[dependency-groups]\ntest = ["pytest", "precision-lab", { include-group = "more" }]\nmore = []\n'
        empty.write(f"packages/precision-{name}/pyproject.toml", text=text)
        empty.write(f"packages/precision-{name}/src/a.py", text="first\n")
    empty.write("examples/kahan/pyproject.toml", text=project("kahan", '"precision-fsdp"'))
    empty.write("ci/matrix.toml", text="".join(f'[[row]]\npackage = "{name}"\n' for name in ROWS))
    empty.commit()
    return empty


@pytest.fixture
def repo(original: Any, tmp_path: Path) -> Any:
    return original.copied(tmp_path / "repository")


def affected(repo: Any, *base: str) -> set[str]:
    printed = repo.script("affected.py", *base)
    assert printed == "" or printed.count("\n") == 1
    return set(printed.split())


def tags(*names: str) -> set[str]:
    return {"tests-integration", *names}


PATHS = {
    "packages/precision-te/src/a.py": tags("precision-te"),
    "packages/precision-te/README.md": tags("precision-te"),
    "packages/precision-lab/src/new.py": tags("precision-lab", "precision-te"),
    "packages/precision-fsdp/src/a.py": tags("precision-fsdp", "examples/kahan"),
    "packages/precision-core/src/a.py": ALL,
    "tests-integration/test_a.py": tags(),
    "examples/kahan/kahan.py": tags("examples/kahan"),
    "examples/README.md": tags(),
    "examples/a folder/ünï\n.py": tags(),
    **dict.fromkeys(("noxfile.py", "pyproject.toml", "ci/a.py", ".ci/run", "conftest.py", "packages/x"), ALL),
    **dict.fromkeys(("BENCHMARKS.md", "CONTRIBUTING.md", "LICENSE"), frozenset()),
    **dict.fromkeys(("benchmarks/a.py", "ci/ran.toml", "README.md", "docs/a/b.md", "mkdocs.yml"), tags()),
}
EXAMPLES = ("packages/precision-te/src/a.py", "examples/a folder/ünï\n.py", "noxfile.py", "README.md")


@pytest.mark.parametrize(("path", "expected"), PATHS.items())
def test_what_a_path_affects(repo: Any, path: str, expected: set[str]) -> None:
    repo.write(path)
    assert affected(repo, "HEAD") == expected


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.full] * (path not in EXAMPLES)) for path in PATHS]
)
def test_a_change_is_untracked_staged_or_committed(repo: Any, path: str) -> None:
    repo.write(path)
    assert affected(repo, "HEAD") == PATHS[path]
    repo.git("add", "--all")
    assert affected(repo, "HEAD") == PATHS[path]
    repo.commit()
    assert affected(repo) == PATHS[path]  # the commit before is the default


def test_nothing_is_printed_where_nothing_changed(repo: Any) -> None:
    repo.write(".gitignore", text="*.log\n")
    repo.commit()
    repo.write("packages/precision-core/a.log")
    assert affected(repo, "HEAD") == set()


def test_the_default_is_where_the_branch_left_origin_main(repo: Any) -> None:
    repo.git("switch", "--quiet", "--create", "branch")
    repo.write("packages/precision-te/src/a.py")
    repo.commit()
    repo.write("LICENSE")
    repo.commit()
    repo.git("switch", "--quiet", "main")
    repo.write("packages/precision-core/src/a.py")  # what came to main since is no change of the branch's
    repo.commit()
    repo.git("update-ref", "refs/remotes/origin/main", "main")
    repo.git("switch", "--quiet", "branch")
    assert affected(repo) == affected(repo, "main") == tags("precision-te")
    assert affected(repo, "HEAD~1") == set()


def test_a_file_moved_between_packages_affects_both(repo: Any) -> None:
    repo.git("mv", "packages/precision-fsdp/src/a.py", "packages/precision-te/src/b.py")
    assert affected(repo, "HEAD") == tags("precision-fsdp", "precision-te", "examples/kahan")


def test_a_removed_package_affects_its_dependants_only(repo: Any) -> None:
    repo.git("rm", "-r", "--quiet", "packages/precision-lab")
    assert affected(repo, "HEAD") == tags("precision-te")


def test_what_has_no_row_has_no_tag(repo: Any) -> None:
    repo.write("packages/precision-new/pyproject.toml", text=project("precision-new"))
    assert affected(repo, "HEAD") == tags()


def test_a_folder_below_is_as_good_as_the_root(repo: Any) -> None:
    repo.write("packages/precision-te/src/a.py", "packages/precision-fsdp/src/new.py")
    below = repo.below("packages/precision-te")
    assert affected(below, "HEAD") == tags("precision-te", "precision-fsdp", "examples/kahan")


def test_an_unknown_base_is_an_error(repo: Any) -> None:
    assert "git knows no commit 'mian' here: name the one to compare with" in repo.error("affected.py", "mian")
    assert "git knows no commit 'HEAD~1' here" in repo.error("affected.py")  # there is one commit only
    repo.git("switch", "--quiet", "--orphan", "other")
    repo.write("README.md")
    repo.commit()
    assert "'main' and HEAD have no commit in common" in repo.error("affected.py", "main")
