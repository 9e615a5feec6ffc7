"""What the tests share: DeepSpeed is imported once, before ranks are forked from this process."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch

# The tests' tensors are tiny, and on a busy machine threads that wait for each other take minutes.
torch.set_num_threads(1)

# What DeepSpeed itself does with torch 2.13, and we have no hand in.
VENDORS_WARNINGS = (
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning",
    "ignore:`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated:FutureWarning",
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",  # torch.compile, on that version alone
)


def pytest_configure(config: pytest.Config) -> None:
    for line in VENDORS_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def _imported() -> None:
    import deepspeed

    importlib.import_module("torch._inductor.compile_fx")  # stage 3 imports it: seconds that each rank would spend anew

    deepspeed.utils.logger.setLevel(logging.ERROR)


@pytest.fixture
def float16_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets DeepSpeed's accelerator say that it has float16; CPUs without units for it compute in it all the same."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
