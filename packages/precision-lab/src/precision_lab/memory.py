"""Peak memory of a training run, by torch's allocator on CUDA and by the operating system elsewhere.

On CUDA, torch's allocator knows its peak exactly; what tensors took before, the text for example, does not count.
Anywhere else the process is asked: the growth of its resident peak
over its resident size at the start, when everything is imported and the model does not exist yet. That includes what
libraries allocate on first use (threads, workspaces), so it is the same for each mode only in a fresh process.

Linux: VmHWM, the peak of this program. ru_maxrss, which other systems have, would be wrong there: a child starts with
its parent's peak, as exec does not reset it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from precision_lab.shown import human_bytes

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """The growth of memory since its construction, at most."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before = _resident("VmRSS")

    def read(self) -> int | None:
        """Returns bytes; None where the operating system does not say."""
        on_cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if on_cuda else _resident("VmHWM")
        return None if peak is None or self._before is None else max(0, peak - self._before)


def _resident(field: str) -> int | None:
    """Returns the process's resident bytes now (VmRSS) or at their peak (VmHWM); without /proc always the peak."""
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines[field].split()[0]) * 1024  # "  1234 kB"
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def explain_full(reason: str) -> tuple[str, bool]:
    """Returns why a process failed, in words where memory ran out, and whether that may be the reason."""
    if asked := re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", reason):
        reason = f"out of memory: it asked for another {human_bytes(int(asked[1]))}"
    elif "MemoryError" in reason:
        reason = f"out of memory: {reason}"
    return reason, "out of memory" in reason.lower() or "memory full" in reason
