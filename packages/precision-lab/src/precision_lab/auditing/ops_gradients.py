"""What operations of the loop do to gradients between backward and step: clip, unscale, clear, read, add up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from precision_lab.auditing.gradients import factor_of
from precision_lab.auditing.holds import HALVES
from precision_lab.auditing.record import Event
from precision_lab.auditing.where import Line

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder

_UNSCALING = "_amp_foreach_non_finite_check_and_unscale_"
_COPYING = frozenset(["copy_", "_foreach_copy_"])
_CLEARING = frozenset(["zero_", "_foreach_zero_"])
CHANGING = frozenset(["mul", "div", "add", "sub", "clamp", "clip", "clamp_min", "clamp_max", "nan_to_num", "where"])
_MAKING = ("empty_like", "zeros_like", "ones_like", "rand", "full_like", "new_", "is_", "_has_")
"""Names of operations that take of a gradient its shape alone, or begin so."""
_SETTING = frozenset(["zero_", "_foreach_zero_", "copy_", "set_", "detach_", "resize_", "fill_"])
"""Operations that write a gradient without changing what it says of this step: clearing, moving."""


class GradientOps:
    """Notes them, by which parameters' gradients they have to do with."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def note(
        self, name: str, writes: bool, args: tuple[Any, ...], inputs: list[Tensor], result: Any, line: Line | None
    ) -> None:
        """Called after an operation that ran outside of models, backward and step."""
        recorder = self._recorder
        gradients = recorder.gradients
        written = gradients.find(args[0] if args else ()) if writes else []
        if name in _CLEARING and written:
            recorder.note("cleared", line, ids=written)
        if name == _UNSCALING and written:
            recorder.note("unscaled", line, ids=written, inverse=float(args[2]), found=bool(args[1]))
        elif written and name in _COPYING:
            gradients.copied(args[0], args[1])
        elif written and name not in _SETTING:
            self._changed(name, args, written, line)
        elif name == "_local_scalar_dense" and (read := gradients.computed_from(inputs[0])):
            recorder.note("gradients_read", line, ids=list(read))
        elif inputs and not name.startswith(_MAKING):
            self._added(name, inputs, line)
            in_loop = "clip_grad" not in "".join(recorder.where.functions(4))
            changes = in_loop and name.removeprefix("_foreach_") in CHANGING
            event = (lambda ids: self._changed(name, args, [], line)) if changes else lambda ids: None
            gradients.follow(name, args, inputs, result, event)

    def _added(self, name: str, inputs: list[Tensor], line: Line | None) -> None:
        """Notes that gradients are added up in half, in tensors of the user's own."""
        if name.removeprefix("_foreach_").rstrip("_") != "add" or len(inputs) < 2 or inputs[0].dtype not in HALVES:
            return
        computed_from, half = self._recorder.gradients.computed_from, len(inputs) // 2
        ids = [
            each
            for into, other in zip(inputs[:half], inputs[half:], strict=False)
            if other.dim()
            for each in set(computed_from(other)) & set(computed_from(into))
        ]
        if ids:
            self._recorder.note("added", line, ids=ids, dtype=inputs[0].dtype)

    def note_hook(self, name: str, args: tuple[Any, ...], param: Any) -> None:
        """Notes what a hook of the user's does to a parameter's gradient within backward."""
        line = self._recorder.where.line(4)
        if line != self._recorder.backward_line:
            self._recorder.gradients.forget()
            self._changed(name, args, [id(param)], line)

    def _changed(self, name: str, args: tuple[Any, ...], ids: list[int], line: Line | None) -> Event:
        recorder = self._recorder
        if "mul" in name and isinstance(args[0], Tensor) and not args[0].dim():  # a number times gradients
            args = (args[1], args[0], *args[2:])
        by, others = factor_of(name, args)
        computed = [each for each in others if recorder.gradients.computed_from(each)]
        degree = max((recorder.gradients.degree(each) for each in computed), key=abs, default=0.0)
        functions, limit = recorder.where.functions(5), recorder.where.value_in("clip_grad", ("max_norm", "clip_value"))
        return recorder.note(
            "gradients", line, how=name, functions=functions, ids=ids, by=by, computed=bool(computed), degree=degree,
            limit=limit, others=len(others),
        )  # fmt: skip
