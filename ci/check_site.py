"""`python ci/check_site.py site`: nothing in a built site is loaded from another host, and each link leads somewhere.

mkdocs checks the links that are written in pages; this reads what was built: the theme's and the API's links, anchors,
style sheets, and that each page has its Markdown twin, in llms.txt too. Standard library alone.
"""

from __future__ import annotations

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

LOADS = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
"""Element -> the attributes whose address a browser loads by itself."""
LINKS_ONLY = {"canonical", "next", "prev", "alternate"}
"""What a <link> may say without anything being loaded."""
STYLE = re.compile(r"(?:@import\s+|url\()\s*['\"]?((?:https?:)?//[^'\")\s]+)")


class Page(HTMLParser):
    """What one page loads, links to, and can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        self._style = tag == "style"
        self.loads += STYLE.findall(given.get("style", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        relation = set(given.get("rel", "").split())
        for name in LOADS.get(tag, ()):
            if name in given and not (tag == "link" and relation <= LINKS_ONLY and relation):
                self.loads.append(given[name])

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if self._style:
            self.loads += STYLE.findall(data)


def is_foreign(address: str) -> bool:
    return bool(re.match(r"\s*(https?:)?//", address, re.IGNORECASE))


def problems(site: Path) -> list[str]:
    """Returns a line for each address of another host that is loaded, each dead link, and each missing twin."""
    site = site.resolve()
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        found += [f"{name} loads {address}" for address in page.loads if is_foreign(address)]
        for link in dict.fromkeys([*page.links, *page.loads]):
            there = _from_root(link, site) if name == "404.html" else link
            if reason := _dead(there, path, pages) if there is not None else "it works in one folder alone":
                found.append(f"{name} links to {link}: {reason}")
        if name != "404.html" and not path.with_suffix(".md").exists():
            found.append(f"{name} has no twin in Markdown")
    for path in sorted(site.rglob("*.css")):
        found += [f"{path.relative_to(site)} loads {address}" for address in STYLE.findall(path.read_text())]
    listed = (site / "llms.txt").read_text() if (site / "llms.txt").exists() else ""
    twins = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.md"))
    return found + [f"llms.txt does not list {name}" for name in twins if f"]({name})" not in listed]


def _from_root(link: str, site: Path) -> str | None:
    """Returns a link of 404.html, which is shown at any depth, as one in the site's folder; None: it is relative."""
    root = urlsplit(os.environ.get("SITE_URL", "")).path.rstrip("/") + "/"
    if re.match(r"[a-z]+:|//|#", link):
        return link
    return f"{site}/{link.removeprefix(root)}" if link.startswith(root) else None


def _dead(link: str, path: Path, pages: dict[Path, Page]) -> str:
    if re.match(r"[a-z]+:|//", link):
        return ""
    address, anchor = urldefrag(link)
    target = Path(os.path.normpath(path.parent / unquote(address))) if address else path
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return "there is no such file"
    if anchor and target in pages and unquote(anchor) not in pages[target].ids:
        return "the page has no such anchor"
    return ""


def main() -> None:
    site = Path(sys.argv[1])
    found = problems(site)
    print(*found, sep="\n" if found else "")
    if found:
        sys.exit(f"check_site: {len(found)} problems")


if __name__ == "__main__":
    main()
