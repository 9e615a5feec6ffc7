"""What the tests share: the runtime on the CPU, and programs that need a process of their own."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from precision_core.testing import Problem

# The vendor's variables for starting, which a user sets in the shell. Programs that are compiled without optimisation
# compute the same, and are compiled in half the time.
os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
if "CPU_NUM_DEVICES" not in os.environ:  # else the test that needs it starts the runtime as it must be
    importlib.import_module("torch_xla").device()  # before the first backward of any test, as torch wants it
torch.set_num_threads(1)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_python() -> Run:
    """Returns what runs Python in a new process: `run_python("print(1)", CPU_NUM_DEVICES="2")`, or with arguments.

    None takes a variable away. The result has what it printed, and what it returned.
    """

    def run(*arguments: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for name, value in variables.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        command = ["-c", textwrap.dedent(arguments[0])] if len(arguments) == 1 else list(arguments)
        return subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=1800, check=False
        )

    return run


class ErfGELU(nn.Module):
    """GELU in float64 to its last digits; torch_xla's own is right to 8."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


class SpeltOut(Problem):
    def model(self) -> nn.Module:
        model = super().model()
        for block in model.blocks:  # type: ignore[union-attr]
            block.mlp[1] = ErfGELU()
        return model


@pytest.fixture
def problem_of() -> Callable[[str], Problem]:
    """Returns the problem to train in a mode: the one that `loss_bound` is for, up to how its GELU is written."""
    return lambda mode: SpeltOut() if mode in ("64-true", "32-true") else Problem()  # 32-true is 64-true's control
