"""The page has what the report has, whatever characters are in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from precision_lab.auditing.context import audit
from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.page import page, write_page
from precision_lab.auditing.report import Report


@pytest.fixture
def report() -> Report:
    model = nn.ModuleDict({"a<b": nn.Linear(2, 2)})
    with audit(model) as found:
        model["a<b"](torch.ones(1, 2)).sum().backward()
    found.findings = [Finding("some-code", "warning", "x < y", "because", Remedy("do this", "or & that"))]
    return found


def test_everything_is_there_and_escaped(report: Report, tmp_path: Path) -> None:
    text = page(report, "train.py")
    for expected in ("1 warning", "some-code", "x &lt; y", "or &amp; that", "a&lt;b", "products, forward", "train.py"):
        assert expected in text, expected
    assert "http" not in text and "a<b" not in text
    write_page(report, str(tmp_path / "page.html"), "train.py")
    assert (tmp_path / "page.html").read_text("utf-8") == text


def test_the_dict_is_plain(report: Report) -> None:
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["findings"][0]["code"] == "some-code" and plain["findings"][0]["remedy"] == "do this"
    assert plain["ledger"]["params"] == {"float32": 24}
