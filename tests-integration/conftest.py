"""What the tests share, and the composition table at the end of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

# The tests' tensors are tiny, and on a busy machine threads that wait for each other take minutes.
torch.set_num_threads(1)

COMPOSITION = "composition"
"""The property in which a test reports (mode, strategy, what came of the pair)."""


class Table:
    """What came of each pair: reports come from this process, or from all of pytest-xdist's."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == COMPOSITION:
                mode, strategy, result = value  # type: ignore[misc]
                self.pairs[mode, strategy] = result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.pairs:
            return
        terminalreporter.section("composition")
        widths = [max(len(pair[index]) for pair in self.pairs) for index in (0, 1)]
        for (mode, strategy), result in sorted(self.pairs.items()):
            terminalreporter.line(f"{mode:<{widths[0]}}  {strategy:<{widths[1]}}  {result}")


# What DeepSpeed itself does with torch 2.13, and we have no hand in.
VENDORS_WARNINGS = (
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning",
    "ignore:`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignores them in the tests here that name it."""
    for item in items:
        if Path(__file__).parent in item.path.parents and "deepspeed" in item.name:
            item.add_marker(pytest.mark.filterwarnings(*VENDORS_WARNINGS), append=False)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Table())
