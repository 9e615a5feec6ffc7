"""What the tests on a GPU share. They run last: a process that has used CUDA cannot fork ranks that compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: Path(__file__).parent in item.path.parents)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """One rank runs in this process: its group ends with the test, and torch waits in silence again."""
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
    if dist.is_initialized():
        dist.destroy_process_group()
