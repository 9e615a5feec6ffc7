"""Counting optimizer steps: how many were taken, how many were skipped, and when too many in a row were."""

from __future__ import annotations

import torch
from torch import Tensor

READ_EVERY = 100
"""On devices where reading a value is a host sync, the flags of this many steps are read at once."""


class StepCounter:
    """Counts steps taken and skipped.

    A known outcome is counted with `add`; a flag on a device goes to `add_later`, and is read with the others at the
    next `read`.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.last_skipped = False
        self._unread: list[Tensor] = []

    def add(self, skipped: bool) -> None:
        """Counts one step whose outcome is known."""
        if self._unread:
            self.read()
        self._count(skipped)

    def add_later(self, found_inf: Tensor) -> None:
        """Counts one step that a device skips exactly when `found_inf` (one number) is not zero."""
        self._unread.append(found_inf.detach().clone())
        if len(self._unread) >= READ_EVERY:
            self.read()

    def read(self) -> None:
        """Brings the counters up to date; a host sync where flags are on a device."""
        if self._unread:
            flags = torch.stack(self._unread).tolist()
            self._unread.clear()
            for flag in flags:
                self._count(flag != 0)

    def _count(self, skipped: bool) -> None:
        self.last_skipped = skipped
        if skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.steps += 1
            self.skipped_in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """Returns the counts as plain numbers."""
        self.read()
        return {
            "steps": self.steps,
            "skipped_steps": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "last_step_skipped": int(self.last_skipped),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores what `state_dict` returned."""
        self._unread.clear()
        self.steps = state["steps"]
        self.skipped = state["skipped_steps"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.last_skipped = bool(state["last_step_skipped"])
