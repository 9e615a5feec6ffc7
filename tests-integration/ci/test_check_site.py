"""What the check of the built site finds, on sites of two pages."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "ci" / "check_site.py"
problems = runpy.run_path(str(SCRIPT))["problems"]


def make(site: Path, body: str, css: str = "") -> Path:
    (site / "sub").mkdir()
    (site / "index.html").write_text(f"<html><head><link rel=canonical href=https://a.b/></head>{body}</html>")
    (site / "index.md").write_text("# Home\n")
    (site / "sub" / "page.html").write_text('<h2 id="here">Here</h2><a href="../index.html">home</a>')
    (site / "sub" / "page.md").write_text("# Page\n")
    (site / "site.css").write_text(css)
    (site / "picture.svg").write_text("<svg/>")
    (site / "llms.txt").write_text("- [Home](index.md)\n- [Page](sub/page.md)\n")
    return site


GOOD = (
    '<link rel="stylesheet" href="site.css"><img src="picture.svg"><a href="sub/page.html#here">there</a>'
    '<a href="https://example.org/">a link may lead to another host</a><a href="#top" id="top">up</a>'
)


def test_a_site_that_is_right(tmp_path: Path) -> None:
    assert problems(make(tmp_path, GOOD, "a { background: url(picture.svg) }")) == []


@pytest.mark.parametrize(
    ("body", "address"),
    [
        ('<script src="https://cdn.example.org/a.js"></script>', "https://cdn.example.org/a.js"),
        ('<link rel="stylesheet" href="https://fonts.example.org/css">', "https://fonts.example.org/css"),
        ('<link rel="preconnect" href="https://fonts.example.org">', "https://fonts.example.org"),
        ('<img src="http://example.org/a.png">', "http://example.org/a.png"),
        ('<img src="//example.org/a.png">', "//example.org/a.png"),
        ('<iframe src="https://example.org/video"></iframe>', "https://example.org/video"),
        ('<p style="background: url(https://example.org/a.png)">', "https://example.org/a.png"),
        ("<style>@import 'https://example.org/a.css';</style>", "https://example.org/a.css"),
    ],
)
def test_what_another_host_serves(body: str, address: str, tmp_path: Path) -> None:
    assert problems(make(tmp_path, GOOD + body)) == [f"index.html loads {address}"]


def test_a_style_sheet_that_loads_from_another_host(tmp_path: Path) -> None:
    css = "@font-face { src: url('https://example.org/font.woff2') }"
    assert problems(make(tmp_path, GOOD, css)) == ["site.css loads https://example.org/font.woff2"]


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("sub/other.html", "there is no such file"),
        ("sub/page.html#there", "the page has no such anchor"),
        ("#there", "the page has no such anchor"),
    ],
)
def test_links_that_lead_nowhere(link: str, reason: str, tmp_path: Path) -> None:
    found = problems(make(tmp_path, f'{GOOD}<a href="{link}">link</a>'))
    assert found == [f"index.html links to {link}: {reason}"]


def test_a_page_without_its_twin_and_a_twin_that_is_not_listed(tmp_path: Path) -> None:
    site = make(tmp_path, GOOD)
    (site / "index.md").unlink()
    (site / "llms.txt").write_text("- [Home](index.md)\n")
    assert problems(site) == ["index.html has no twin in Markdown", "llms.txt does not list sub/page.md"]


@pytest.mark.parametrize(
    ("address", "link", "problem"),
    [
        ("", "/sub/page.html#here", None),
        ("https://a.b/c/", "/c/sub/page.html#here", None),
        ("", "sub/page.html", "it works in one folder alone"),
        ("", "/sub/other.html", "there is no such file"),
        ("https://a.b/c/", "/sub/page.html", "it works in one folder alone"),
    ],
)
def test_links_of_the_page_for_missing_pages_work_at_any_depth(
    address: str, link: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SITE_URL", address)
    site = make(tmp_path, GOOD)
    (site / "404.html").write_text(f'<a href="#top" id="top">up</a><a href="{link}">link</a>')
    assert problems(site) == ([f"404.html links to {link}: {problem}"] if problem else [])
