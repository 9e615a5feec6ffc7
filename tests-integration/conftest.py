"""What the tests share, and the composition table at the end of the run."""

from __future__ import annotations

import pytest
import torch

# The tests' tensors are tiny, and on a busy machine threads that wait for each other take minutes.
torch.set_num_threads(1)

PAIRS = pytest.StashKey[dict[tuple[str, str], str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PAIRS] = {}


@pytest.fixture
def composition(request: pytest.FixtureRequest) -> dict[tuple[str, str], str]:
    """(mode, strategy) -> what came of the pair; printed when the tests are done."""
    return request.config.stash[PAIRS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    pairs = terminalreporter.config.stash[PAIRS]
    if pairs:
        terminalreporter.section("composition")
        widths = [max(len(pair[index]) for pair in pairs) for index in (0, 1)]
        for (mode, strategy), result in pairs.items():
            terminalreporter.line(f"{mode:<{widths[0]}}  {strategy:<{widths[1]}}  {result}")
