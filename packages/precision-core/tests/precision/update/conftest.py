"""The models of these tests are small, and stepped in pieces all the same."""

from __future__ import annotations

import pytest

from precision_core.precision.update import rows


@pytest.fixture(autouse=True)
def cut(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.module.__name__.rpartition(".")[2] not in ("test_rows", "test_memory"):  # of rows as they are
        monkeypatch.setattr(rows, "_LEAST_BYTES", 0)
