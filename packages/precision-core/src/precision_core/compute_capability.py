"""What CUDA's devices are, without CUDA: a process that has initialised it can fork no rank that uses it.

torch counts devices by NVML, and says a device's compute capability by CUDA alone; `nvidia-smi` says it too.
"""

from __future__ import annotations

import functools
import shutil
import subprocess

import torch

_QUERY = ("--query-gpu=compute_cap", "--format=csv,noheader")


def compute_capability() -> tuple[int, int]:
    """Returns that of the current device; CUDA is asked where it runs already, or where nobody else can tell.

    Raises:
        AssertionError, RuntimeError: torch has no CUDA, or finds no device.
    """
    if not torch.cuda.is_initialized():
        found = _by_nvidia_smi(shutil.which("nvidia-smi"))
        if len(found) == 1:  # else it depends on CUDA_VISIBLE_DEVICES and on CUDA's order which one is the first
            return next(iter(found))
    major, minor = torch.cuda.get_device_capability()
    return major, minor


@functools.cache
def _by_nvidia_smi(executable: str | None) -> frozenset[tuple[int, int]]:
    """Returns those of all devices of this machine; none where it does not answer."""
    if executable is None:
        return frozenset()
    try:
        answer = subprocess.run([executable, *_QUERY], capture_output=True, text=True, timeout=30, check=True)
        pairs = (line.strip().split(".") for line in answer.stdout.splitlines() if line.strip())
        return frozenset((int(major), int(minor)) for major, minor in pairs)
    except (OSError, subprocess.SubprocessError, ValueError):  # an old one does not know the field
        return frozenset()
