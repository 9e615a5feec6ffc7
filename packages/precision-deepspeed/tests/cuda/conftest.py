"""What the tests on a GPU share. They run last: a process that has used CUDA cannot fork ranks that compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from precision_deepspeed import vendor


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: Path(__file__).parent in item.path.parents)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Ends what engines of one rank in this process leave behind for a whole process."""
    from deepspeed.runtime import torch_autocast

    yield
    vendor.give_linear_back()
    torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None
    if torch.distributed.is_initialized():
        vendor.end_process_group()
