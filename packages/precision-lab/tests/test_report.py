import re
from html.parser import HTMLParser

import pytest

from precision_lab.report import report, save_report
from precision_lab.results import Comparison, Row

VOID = {"meta", "circle", "line", "polyline"}


class Balanced(HTMLParser):
    """Every tag is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)


def row(mode, factor, noise=(), **more):
    losses = [factor * (2 + 3 / (1 + step)) for step in range(30)]
    entries = [(f"layer{n}", value, value) for n, value in enumerate(noise)]
    return Row(mode, "done", "", losses, [0.1] * 30, 2.2 * factor, 4000, 4000, 8000, 20_000, 0, noise=entries, **more)


@pytest.fixture(scope="module")
def comparison():
    rows = [row("64-true", 1.0), row("32-true", 1.000001, [140, 139]), row("bf16-true", 1.001, [50, 49, 20])]
    rows[2].parameter_bytes, rows[2].policy = 2000, {"compute": "bfloat16"}
    rows += [Row("16-true", "failed", "<b>no</b> & none", [5.0, 4.0], [0.1, 0.1]), Row("16-mixed", reason="slow")]
    repeats = [row("32-true", 1.01, seed=1, repeat=True), row("32-true", 0.99, seed=2, repeat=True)]
    here = {"device": "cpu", "torch": "2.13.0", "parameters": 1000}
    return Comparison(30, 0, rows, task="folder/task.py:make", repeats=repeats, environment=here)


def test_the_page_is_whole_and_needs_no_network(comparison, tmp_path):
    save_report(comparison, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    parser = Balanced()
    parser.feed(page)
    assert not parser.wrong and not parser.open
    assert not re.search(r"https?:|src=|@import|url\(|<script|<link", page)
    assert "prefers-color-scheme: dark" in page and "@media print" in page and "width=device-width" in page


def test_the_verdict_comes_first_then_table_curves_bytes_and_layers(comparison):
    page = report(comparison)
    order = [page.index(part) for part in ("<h1>", "Figures", "Curves", "Bytes by kind", "signal to noise, in dec")]
    assert order == sorted(order)
    assert "Take bf16-true" in page[: order[1]] and "task.py:make" in page and "folder" not in page
    assert "&lt;b&gt;no&lt;/b&gt; &amp; none" in page and "<b>no</b>" not in page and "slow" in page
    assert page.count("<polyline") == 4 + 4 - 1 + 3  # losses; their end, which the failed one has none of; drifts
    # 20 dB is more noise than three layers of bfloat16 explain, and than the one that gradients have come through
    assert re.findall(r"class=marked>(\d+)<", page) == ["20", "20"]


def test_what_there_is_nothing_of_is_left_out():
    page = report(Comparison(30, 0, [Row("32-true", "failed", "broke")]))
    assert "No verdict" in page and "broke" in page
    assert not any(part in page for part in ("Curves", "Bytes by kind", "signal to noise"))
