"""The pytest plugin of ci/gpu.py: a line of JSON for each test as soon as it is over, so that none is lost."""

from __future__ import annotations

import json
import os
from typing import Any


def append(path: str, **entry: object) -> None:
    """Adds one line to the file, in one write."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def pytest_runtest_logreport(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    expected = hasattr(report, "wasxfail")
    outcome = ("xfailed" if report.skipped else "xpassed") if expected else report.outcome
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
    if outcome == "passed" or expected:
        reason = ""
    slice_name, step = os.environ["GPU_SLICE"], os.environ["GPU_STEP"]
    entry = {"test": report.nodeid, "result": outcome, "seconds": round(report.duration, 2), "why": reason[-2000:]}
    append(os.environ["GPU_RESULTS"], kind="test", slice=slice_name, step=step, **entry)
