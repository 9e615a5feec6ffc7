"""What the tests share."""

from __future__ import annotations

import bitsandbytes  # noqa: F401 - as a whole, before a test in which warnings are errors breaks its import off
import torch

# The tests' tensors are tiny, and on a busy machine threads that wait for each other take minutes.
torch.set_num_threads(1)
