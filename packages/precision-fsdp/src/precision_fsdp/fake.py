"""Fake parameters: a model under torch's `FakeTensorMode` is set up and steps as any other, for estimates of memory.

They have shapes and no values: nothing can be compared over ranks, and nothing need be sent. torch has no public name
for the mode, which is read here alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes


def is_fake(tensor: Tensor) -> bool:
    """Returns whether the tensor, or parameter, has no values."""
    return isinstance(tensor, FakeTensor)


def outside_of_modes() -> AbstractContextManager[Any]:
    """Context in which tensors have values again: a mesh is made of some, and reads them."""
    return _disable_current_modes()
