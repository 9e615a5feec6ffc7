"""What the tests share."""

from __future__ import annotations

import pytest
import torch

# The tests' tensors are tiny, and on a busy machine threads that wait for each other take minutes.
torch.set_num_threads(1)


@pytest.fixture
def true_modes_compile() -> None:
    """Skips where torch.compile is too old for true modes, which core refuses there."""
    if torch.__version__ < "2.12":
        pytest.skip("needs torch 2.12: older ones leave tensors created in a compiled forward in the default dtype")
