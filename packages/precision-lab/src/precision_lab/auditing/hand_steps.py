"""Steps that a loop writes itself, without an optimizer: `p -= lr * p.grad`, and what they do to half parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from precision_lab.auditing.gradients import storage
from precision_lab.auditing.holds import HALVES
from precision_lab.auditing.sample import ELEMENTS, local, updates_of
from precision_lab.auditing.where import Line

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder

_ADDING = ("add_", "sub_", "copy_", "addcmul_", "addcdiv_", "_foreach_add_", "_foreach_sub_", "lerp_")
Taken = list[tuple[nn.Parameter, Tensor, Tensor]]


class HandSteps:
    """Finds writes to parameters of what was computed from gradients, and counts them as steps."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._before = 0
        self._written = False  # since the last backward

    @property
    def count(self) -> int:
        """How many steps there were: backwards after which parameters were written."""
        return self._before + self._written

    def before(self, name: str, args: tuple[Any, ...]) -> Taken:
        """Called before an operation of the loop that writes; returns the parameters it steps, and some elements."""
        if name not in _ADDING or len(args) < 2 or self._recorder.gradients.nothing_known:
            return []
        targets, values = (each if isinstance(each, (list, tuple)) else [each] for each in args[:2])
        found: Taken = []
        for target, value in zip(targets, values, strict=False):
            if isinstance(target, Tensor) and isinstance(value, Tensor) and value.dim():
                param = self._param(target)
                if param is not None and self._recorder.gradients.computed_from(value):
                    part = _part(param)
                    found.append((param, part, part.clone()))
        return found

    def after(self, taken: Taken, line: Line | None) -> None:
        """Called after it: counts what stayed as it was."""
        self._written = True
        for param, part, old in taken:
            name = self._recorder.names.param(param)
            if name is None:
                continue
            self._recorder.record.trained.setdefault(name, param.dtype)
            if param.dtype in HALVES and param.grad is not None and param.grad.shape == param.shape:
                moved = _part(param.grad) != 0
                updates = updates_of(self._recorder.record, name, param.dtype)
                updates.seen += int(moved.sum())
                updates.unchanged += int(((part == old) & moved).sum())
        self._recorder.note("hand_step", line, ids=[id(param) for param, _, _ in taken])

    def before_backward(self) -> None:
        """Called before a backward: what was written since the last one was a step."""
        self._before, self._written = self.count, False

    def _param(self, tensor: Tensor) -> nn.Parameter | None:
        """Returns the parameter that the tensor is, or whose `data` it is."""
        if isinstance(tensor, nn.Parameter):
            return tensor
        if tensor.requires_grad or tensor._base is not None:
            return None
        where = storage(tensor)
        return next((each for each in self._recorder.params() if storage(each) == where), None)


def _part(tensor: Tensor) -> Tensor:
    flat = local(tensor.detach()).reshape(-1)
    return flat[:: max(flat.numel() // ELEMENTS, 1)]
