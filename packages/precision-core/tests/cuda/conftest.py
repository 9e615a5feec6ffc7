"""What the tests on a GPU share. They run last: a process that has used CUDA cannot fork ranks that compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: Path(__file__).parent in item.path.parents)


@pytest.fixture
def alone() -> Iterator[None]:
    """Ends the process group of a strategy that runs one rank in this process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
