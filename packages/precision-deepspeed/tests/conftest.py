"""What the tests share: DeepSpeed is imported once, before ranks are forked from this process."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from precision_core.testing import CLEANUPS
from precision_deepspeed import vendor

# The tests' tensors are tiny, and on a busy machine threads that wait for each other take minutes.
torch.set_num_threads(1)

# What DeepSpeed itself does with torch 2.13, and we have no hand in.
VENDORS_WARNINGS = (
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning",
    "ignore:`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated:FutureWarning",
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",  # torch.compile, on that version alone
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignores them in these tests alone, of all that are in the session. A test's own marks come later, and win."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(*VENDORS_WARNINGS), append=False)


@pytest.fixture(scope="session", autouse=True)
def _imported() -> None:
    variables = set(os.environ)
    import deepspeed

    importlib.import_module("torch._inductor.compile_fx")  # stage 3 imports it: seconds that each rank would spend anew

    for name in os.environ.keys() - variables:  # it sets one, which would reach the tests of other packages
        del os.environ[name]
    deepspeed.utils.logger.setLevel(logging.ERROR)
    CLEANUPS.append(forget_engines)


def forget_engines() -> None:
    """Ends what engines that nobody tore down keep for a whole process: for ranks that run one test after another."""
    from deepspeed.runtime import torch_autocast

    vendor.give_linear_back()
    torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None
    if torch.distributed.is_initialized():
        vendor.end_process_group()


def with_float16(function: Callable[..., Any], *args: Any) -> Any:
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
        return function(*args)


@pytest.fixture
def float16_ranks() -> Callable[..., Any]:
    """Returns what calls a function in a rank as `float16_accelerator` lets a test run in this process."""
    return with_float16


@pytest.fixture
def float16_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets DeepSpeed's accelerator say that it has float16; CPUs without units for it compute in it all the same."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
