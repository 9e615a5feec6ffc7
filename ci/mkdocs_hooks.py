"""mkdocs' hooks: the site's pages that are written elsewhere, and what is made of each page. Read by mkdocs.yml.

Pages from elsewhere: the packages' READMEs and changelogs, CONTRIBUTING.md, what ran (ci/ran.toml), and the API (the
names that each package lists). In a page of docs/ a line of its own is replaced:

    <!-- include: docs/generated/modes.md -->                           a file
    <!-- include: packages/precision-core/README.md#Checkpoints -->     a section of it, without its heading
    <!-- diff: docs/migrate/torch_amp -->                               before.py and after.py of the folder, as a diff
    <!-- svg: docs/structure.svg -->                                    the picture itself: it has the page's colours

Built beside each page.html: page.md, the page as Markdown, and llms.txt, which lists them.
"""

from __future__ import annotations

import ast
import difflib
import functools
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "ci"))  # mkdocs runs this file alone

import ran  # noqa: E402

PACKAGES = ("core", "fsdp", "deepspeed", "bnb", "te", "xla", "lab")
SOURCES = {
    **{f"backends/{name}.md": f"packages/precision-{name}/README.md" for name in PACKAGES},
    **{f"changes/{name}.md": f"packages/precision-{name}/CHANGELOG.md" for name in PACKAGES},
    "migrate/lightning-names.md": "packages/precision-core/LIGHTNING.md",
    "plugins/kahan.md": "examples/precision-kahan/README.md",
    "internals/contributing.md": "CONTRIBUTING.md",
}
"""Page -> the file in the repository that it is made of."""
PAGES = {source: page for page, source in SOURCES.items()}

API = {
    "api/core.md": ("precision_core", "What users import from `precision_core`."),
    "api/bnb.md": ("precision_bnb", "What users import from `precision_bnb`."),
    "api/deepspeed.md": ("precision_deepspeed", "What users import from `precision_deepspeed`."),
    "api/fsdp.md": ("precision_fsdp", "What users import from `precision_fsdp`."),
    "api/te.md": ("precision_te", "What users import from `precision_te`."),
    "api/xla.md": ("precision_xla", "What users import from `precision_xla`."),
    "api/lab.md": ("precision_lab", "The functions behind the `precision` command."),
    "api/testing.md": ("precision_core.testing", "For the tests of plugins and strategies; needs pytest."),
    "api/surgery.md": ("precision_core.surgery", "For plugins that replace layers."),
}
"""Page -> the package whose public names it lists, and its first line."""

TWINS: dict[str, tuple[str, str]] = {}
"""Page -> its title and its text, as it was built."""


# -------------------------------------------------------------------- pages from elsewhere


def public_names(package: str) -> list[str]:
    """Returns what a package's `__init__.py` lists in `__all__`, or imports where that is computed; runs nothing."""
    distribution = package.partition(".")[0].replace("_", "-")
    tree = ast.parse((ROOT / "packages" / distribution / "src" / Path(*package.split(".")) / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            try:
                return sorted(ast.literal_eval(node.value), key=str.lower)
            except ValueError:  # it is computed
                break
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").startswith("precision_")]
    return sorted({alias.asname or alias.name for node in ours for alias in node.names}, key=str.lower)


def api_page(package: str, first: str) -> str:
    parts = [f"# {package}", first, *(f"::: {package}.{name}" for name in public_names(package))]
    return "\n\n".join(parts) + "\n"


def relink(text: str, source: str, page: str) -> str:
    """Returns a file's text with links between files of the repository as links between pages.

    What is no page of the site, a source file for example, is named by its path: the site has no address for it.
    """

    def one(match: re.Match[str]) -> str:
        shown, target = match[1], match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        for name in (found, f"{found}/README.md"):
            if name in PAGES or name.startswith("docs/"):
                there = PAGES.get(name, name.removeprefix("docs/"))
                way = posixpath.relpath(there, posixpath.dirname(page) or ".")
                return f"[{shown}]({way}{'#' + anchor if anchor else ''})"
        return f"`{found}`" if shown.strip("`") in (found, posixpath.basename(found)) else f"{shown} (`{found}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", one, text)


def section(text: str, heading: str) -> str:
    """Returns what stands under a heading, up to the next one of its level or above.

    Raises:
        ValueError: there is no such heading.
    """
    lines = text.splitlines()
    fenced = False
    found: list[str] = []
    level = 0
    for line in lines:
        fenced ^= line.startswith("```")
        match = None if fenced else re.fullmatch(r"(#+) (.+)", line)
        if level and match and len(match[1]) <= level:
            break
        if level:
            found.append(line)
        elif match and match[2] == heading:
            level = len(match[1])
    if not level:
        raise ValueError(f"there is no heading {heading!r}")
    return "\n".join(found).strip("\n")


def matrix_page() -> str:
    """Returns the page of what ran when."""
    head, *lines = ran.table(ROOT)
    rows = [head, ("---",) * len(head), *lines]
    text = (ROOT / "docs" / "generated" / "ran.md").read_text()
    return text.replace("<!-- table -->", "\n".join(f"| {' | '.join(row)} |" for row in rows))


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    made = {page: relink((ROOT / source).read_text(), source, page) for page, source in SOURCES.items()}
    made |= {page: api_page(*what) for page, what in API.items()}
    made["ran.md"] = matrix_page()
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


# -------------------------------------------------------------------- lines that stand for something else


def include(argument: str, page: str) -> str:
    source, _, heading = argument.partition("#")
    text = (ROOT / source).read_text()
    if not heading:
        return relink(text, source, page).strip("\n")
    # what leads to another section of that file leads to the page of the whole file
    return relink(section(text, heading).replace("](#", f"]({Path(source).name}#"), source, page).strip("\n")


def diff(argument: str, page: str) -> str:
    before, after = ((ROOT / argument / f"{name}.py").read_text().splitlines() for name in ("before", "after"))
    lines = list(difflib.unified_diff(before, after, "before.py", "after.py", n=100, lineterm=""))
    return "\n".join(["```diff", *lines[3:], "```"])


def svg(argument: str, page: str) -> str:
    return (ROOT / argument).read_text().strip("\n")


COMMANDS = {"include": include, "diff": diff, "svg": svg}
LINE = re.compile(r"^<!-- (include|diff|svg): (.+) -->$", re.MULTILINE)


def expand(text: str, page: str) -> str:
    """Returns a page with what its lines stand for."""
    return LINE.sub(lambda match: COMMANDS[match[1]](match[2], page), text)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    text = expand(markdown, page.file.src_uri)
    TWINS[page.file.src_uri] = (page.title or config.site_name, text)
    return text


# -------------------------------------------------------------------- the twins


@functools.cache
def _loader() -> Any:
    """Returns what has read all packages' sources, once: it imports nothing."""
    import griffe

    loader = griffe.GriffeLoader(search_paths=[str(path) for path in (ROOT / "packages").glob("*/src")])
    for package in {package.partition(".")[0] for package, _ in API.values()}:
        loader.load(package)
    loader.resolve_aliases(external=False)
    return loader


def as_markdown(name: str) -> str:
    """Returns a name of the API as Markdown: its signature and its docstring, and those of its public methods."""
    what = _loader().modules_collection[name]
    parts = [f"## {what.name}", _described(what)]
    if what.is_class:
        for member in what.all_members.values():
            if not member.name.startswith("_") and member.is_function and member.docstring:
                parts += [f"### {what.name}.{member.name}", _described(member)]
    return "\n\n".join(part for part in parts if part)


def _described(what: Any) -> str:
    signature = ""
    target = what.all_members.get("__init__") if what.is_class else what if what.is_function else None
    if target is not None and target.is_function:
        signature = f"```python\n{what.name}({', '.join(_parameters(target))})\n```\n\n"
    return signature + (what.docstring.value if what.docstring else "")


def _parameters(function: Any) -> list[str]:
    return spelled([(each.name, each.kind.value, each.default) for each in function.parameters])


def spelled(parameters: list[tuple[str, str, str | None]]) -> list[str]:
    """Returns parameters (name, kind, default) as a `def` has them, `*` and `/` included, without annotations."""
    found: list[str] = []
    before = ""
    for name, kind, default in parameters:
        if name in ("self", "cls"):
            continue
        if before == "positional-only" != kind:
            found.append("/")
        if kind == "keyword-only" and before not in (kind, "variadic positional"):
            found.append("*")
        star = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        found.append(f"{star}{name}" + (f"={default}" if default is not None and not star else ""))
        before = kind
    return [*found, "/"] if before == "positional-only" else found


def twin(text: str) -> str:
    """Returns a page's text as its twin has it: API names written out, pictures left out."""
    text = re.sub(r"^::: (\S+)$", lambda match: as_markdown(match[1]), text, flags=re.MULTILINE)
    return re.sub(r"<svg.*?</svg>\n?", "", text, flags=re.DOTALL)


def on_post_build(config: Any) -> None:
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for page, (title, text) in TWINS.items():
        (site / page).write_text(twin(text))
        lines.append(f"- [{title}]({page})")
    (site / "llms.txt").write_text("\n".join(lines) + "\n")
