"""Delayed scaling's state of one layer: the amax history of past steps, and the scales computed from it.

The rules are the vendor's (`DelayedScaling`): row 0 of the history is the running amax until the end of a forward
(input, weight) or backward (gradient); then the scale is computed, and the history shifts by one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from precision_te.recipes import Delayed
from precision_te.reference.formats import FORMATS
from precision_te.reference.operands import Role
from precision_te.reference.scaling import amax, quotient

COLUMNS: dict[Role, int] = {"input": 0, "weight": 1, "grad": 2}
_LARGEST = torch.finfo(torch.float32).max


class AmaxState:
    """`scale` (3,) and `history` (steps, 3), float32, of a layer's input, weight and gradient of the output."""

    @torch.inference_mode(False)  # what is made in inference mode could not be written to in training
    def __init__(self, steps: int, device: torch.device) -> None:
        self.scale = torch.ones(3, dtype=torch.float32, device=device)
        self.history = torch.zeros(steps, 3, dtype=torch.float32, device=device)

    def record(self, role: Role, x: Tensor) -> None:
        """Updates the running row with the amax of `x`."""
        column = COLUMNS[role]
        self.history[0, column] = torch.maximum(self.history[0, column], amax(x))

    def tensor(self) -> Tensor:
        """Returns the state as one float32 tensor (1 + steps, 3), a copy: the scales, then the history."""
        return torch.cat([self.scale.unsqueeze(0), self.history])

    @classmethod
    def of(cls, tensor: object, device: torch.device) -> AmaxState:
        """Returns the state that `tensor()` gave.

        Raises:
            ValueError: `tensor` is not such a state.
        """
        is_state = isinstance(tensor, Tensor) and tensor.dtype is torch.float32 and tensor.dim() == 2
        if not isinstance(tensor, Tensor) or not is_state or len(tensor) < 2 or tensor.shape[1] != 3:
            given = f"{tensor.dtype} of {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(f"the state of delayed scaling is float32 of shape (1 + steps, 3), and this is {given}")
        state = cls(tensor.shape[0] - 1, device)
        state.scale.copy_(tensor[0])
        state.history.copy_(tensor[1:])
        return state

    @torch.inference_mode(False)
    def resize(self, steps: int, device: torch.device) -> None:
        """Moves the state to `device`, and makes the history `steps` long, as `resized` does."""
        self.scale, self.history = self.scale.to(device), resized(self.history.to(device), steps)

    def update(self, recipe: Delayed, roles: Sequence[Role], ran: Tensor | None = None) -> None:
        """Recomputes the scales of `roles` from their history, and shifts the history by one row.

        Where `ran`, one bool on the device, is False, all stays as it is.
        """
        for role in roles:
            column = slice(COLUMNS[role], COLUMNS[role] + 1)
            history, old = self.history[:, column], self.scale[column]
            largest = FORMATS[recipe.grad_format if role == "grad" else recipe.forward_format].max
            if callable(recipe.amax_compute_algo):
                chosen = recipe.amax_compute_algo(history)
            else:
                chosen = history.amax(0) if recipe.amax_compute_algo == "max" else history[0].clone()
            if recipe.scaling_factor_compute_algo is not None:
                new = recipe.scaling_factor_compute_algo(chosen, old, largest, recipe)
            else:
                new = _scale(chosen, old, largest, recipe.margin)
            shifted = history.roll(-1, 0)
            shifted[0] = 0.0
            self.scale[column] = new if ran is None else torch.where(ran, new, old)
            self.history[:, column] = shifted if ran is None else torch.where(ran, shifted, history)


def resized(history: Tensor, steps: int) -> Tensor:
    """Returns `history` (rows, 3) with `steps` rows: without the oldest ones, or with zeros in place of more."""
    more = steps - len(history)
    if more == 0:
        return history
    zeros = history.new_zeros(max(0, more), history.shape[1], dtype=history.dtype)
    return torch.cat([history[:1], zeros, history[1 + max(0, -more) :]])


def _scale(chosen: Tensor, old: Tensor, largest: float, margin: int) -> Tensor:
    """The vendor's rule: where amax is 0 or infinite, the old scale stays."""
    new = quotient(largest * 2.0**-margin, chosen).clamp(max=_LARGEST)
    return torch.where((chosen > 0) & chosen.isfinite(), new, old)


def reduce(
    states: Sequence[AmaxState | None], ran: Sequence[bool], roles: Sequence[Role], group: dist.ProcessGroup
) -> Tensor:
    """Reduces the running rows of `states` (max) over the ranks in `group`.

    Returns which of them ran on any rank, bool (states,) on the device. All ranks pass equally many, in the same order;
    None where there is no state.
    """
    columns = slice(COLUMNS[roles[0]], COLUMNS[roles[-1]] + 1)
    device = next((state.history.device for state in states if state is not None), torch.device("cpu"))
    rows = torch.zeros(len(states), len(roles) + 1, dtype=torch.float32, device=device)
    for row, state, here in zip(rows, states, ran, strict=True):
        if state is not None:
            row[:-1] = state.history[0, columns]
        row[-1] = float(here)
    dist.all_reduce(rows, dist.ReduceOp.MAX, group=group)
    anywhere = rows[:, -1] > 0
    for row, state, there in zip(rows, states, anywhere, strict=True):
        if state is not None:
            state.history[0, columns] = torch.where(there, row[:-1], state.history[0, columns])
    return anywhere
