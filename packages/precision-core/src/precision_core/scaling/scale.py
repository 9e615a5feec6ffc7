"""Scale: the loss scale of torch's scaler, without needless host syncs, and never below a floor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from precision_core.scaling.gradients import is_plain, unscale_plain


class Scale:
    """The scale of `torch_scaler`; with `avoid_sync` it is never read from its device."""

    def __init__(self, torch_scaler: GradScaler, *, floor: float, avoid_sync: bool) -> None:
        self.torch_scaler = torch_scaler
        self._floor = floor
        self._avoid_sync = avoid_sync
        # On the CPU the parts of torch's scaler are called directly; a subclass may reduce over ranks in its methods.
        self._is_plain = not avoid_sync and type(torch_scaler) is GradScaler
        self._read: tuple[Tensor, int, float] | None = None  # the scale, its version, and its value when last read
        self._inverse: tuple[float, Tensor] | None = None  # a scale, and a tensor of 1 / scale

    def value(self) -> float | Tensor:
        """Returns the scale as it is now: a number, or with `avoid_sync` a copy on the device."""
        scale = self.torch_scaler._scale
        if scale is None:  # no loss was scaled yet
            return self.torch_scaler.get_scale()
        if self._avoid_sync:
            return scale.clone()
        if self._read is None or self._read[0] is not scale or self._read[1] != scale._version:
            self._read = (scale, scale._version, scale.item())
        return self._read[2]

    def times(self, loss: Tensor) -> Tensor:
        """Returns `loss` (any shape) times the scale."""
        scale = self.torch_scaler._scale
        return loss * scale if self._is_plain and scale is not None and loss.is_cpu else self.torch_scaler.scale(loss)

    def unscale(self, optimizer: Optimizer, gradients: list[Tensor]) -> Tensor | None:
        """Divides the gradients of `optimizer` by the scale.

        Returns 1.0 or 0.0 for whether inf or NaN was found; None where torch's scaler has checked, and knows.
        """
        if not (self._is_plain and is_plain(gradients) and gradients[0].is_cpu):
            self.torch_scaler.unscale_(optimizer)
            return None
        scale = self.value()
        assert isinstance(scale, float)
        if self._inverse is None or self._inverse[0] != scale:
            self._inverse = (scale, torch.tensor(1.0 / scale))
        return unscale_plain(gradients, self._inverse[1])

    def update(self) -> None:
        """Updates the scale as torch's scaler does after a step; not below the floor, unless it started there."""
        old = self.value()
        self.torch_scaler.update()
        if isinstance(old, Tensor):
            scale = self.torch_scaler._scale
            assert scale is not None
            torch.maximum(scale, old.clamp(max=self._floor), out=scale)
        elif self.value() < min(old, self._floor):
            self.torch_scaler.update(min(old, self._floor))
