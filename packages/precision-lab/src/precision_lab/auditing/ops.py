"""Every operation that torch dispatches while a loop runs, forward and backward, by line, module and dtypes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from precision_lab.auditing.by_hand import ByHand
from precision_lab.auditing.flow import Flow
from precision_lab.auditing.gradients import storage
from precision_lab.auditing.hand_steps import Taken
from precision_lab.auditing.holds import HALVES as HALVES
from precision_lab.auditing.kinds import CAST, LOSS, OTHER, PRODUCTS, REDUCE, SOFTMAX, SUM, kind_of
from precision_lab.auditing.ops_gradients import CHANGING, GradientOps
from precision_lab.auditing.record import BACKWARD, FORWARD, LOOP, STEP, Op
from precision_lab.auditing.values import Values
from precision_lab.auditing.where import Line

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder

_VIEWS = frozenset(
    [
        "t",
        "detach",
        "view",
        "alias",
        "lift_fresh",
        "_unsafe_view",
        "unsqueeze",
        "squeeze",
        "permute",
        "transpose",
        "as_strided",
        "slice",
        "select",
        "empty",
        "empty_like",
        "_record_function_enter_new",
        "_record_function_exit",
        "reshape",
        "split",
        "unbind",
    ]
)
"""Operations that compute nothing: in backward they are passed over, for they are half of all."""
_ACCUMULATES = "torch::autograd::AccumulateGrad"


class Ops(TorchDispatchMode):
    """The mode under which the loop runs. It calls every operation as it came, and looks at it afterwards.

    What torch.compile generated runs as it would without the mode: of it only calls of vendors' kernels are seen.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._recorder = recorder
        self._rows: dict[Any, Op] = {}
        self._kinds: dict[Any, tuple[str, str, bool]] = {}  # operation -> name, kind, whether it writes an argument
        self.origin: dict[int, tuple[str, Line | None]] = {}  # number of an autograd node -> where it was made
        self._under: set[int] = set()  # numbers of those made under autocast
        self.flow = Flow()
        self._by_hand = ByHand()
        self._values = Values(recorder)
        self._gradients = GradientOps(recorder)
        self._pid = os.getpid()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled."""
        return True

    @property
    def rows(self) -> list[Op]:
        """What was seen."""
        return list(self._rows.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and not isinstance(args[0], Tensor):
            return args[0]  # a mode is given a number where torch had wrapped it in a tensor
        watched = self._recorder.running and os.getpid() == self._pid  # not in a DataLoader's forked worker
        taken = self._before(func, args) if watched else []
        result = func(*args, **kwargs)
        if watched:
            try:
                self._note(func, args, kwargs, result)
                if taken:
                    self._recorder.hand_steps.after(taken, self._recorder.where.line(3))
            except Exception as error:  # the loop is the user's: it goes on, whatever an operand is
                self._recorder.note_unseen(f"operations {func}: {type(error).__name__}: {error}")
        return result

    def _before(self, func: Any, args: tuple[Any, ...]) -> Taken:
        """Looks at an operation of the loop that writes, before it does."""
        recorder = self._recorder
        known = self._kinds.get(func)
        if (known is not None and not known[2]) or recorder.stack or recorder.in_update or recorder.in_backward:
            return []
        try:
            with recorder.quiet():
                return recorder.hand_steps.before(func._schema.name.partition("::")[2], args)
        except Exception as error:
            recorder.note_unseen(f"operations {func}: {type(error).__name__}: {error}")
            return []

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        known = self._kinds.get(func)
        if known is None:
            schema = func._schema
            name = schema.name.partition("::")[2]
            known = self._kinds[func] = name, kind_of(func), schema.is_mutable
        name, kind, writes = known
        recorder = self._recorder
        if kind is OTHER and recorder.in_update and not recorder.in_backward:  # what an optimizer computes: its names
            self._rows.setdefault(func, Op(name, kind, "", STEP, (), None, None, False)).count += 1
            return
        if kind is OTHER and recorder.in_backward and not recorder.stack and name in _VIEWS:
            return
        inputs = list(_tensors((*args, *kwargs.values())))
        outputs = list(_tensors((result,)))
        output = outputs[0] if outputs else None
        if not inputs and kind is OTHER:
            if recorder.stack:
                self.flow.made(outputs)
            if name == "arange" and outputs:
                self._values.made(outputs[0], recorder.where.line(3))
            return
        node = torch._C._current_autograd_node()
        if recorder.stack:
            phase = FORWARD  # in backward, too: of a checkpoint, which runs it once more
        elif node is not None or recorder.in_backward:  # engines reduce when all nodes have run
            phase = BACKWARD
        else:
            phase = STEP if recorder.in_update else LOOP
        autocast = bool(recorder.autocast and inputs) and recorder.autocast_dtype(inputs[0].device.type) is not None
        under = autocast
        if phase == BACKWARD and node is not None:
            module, line = self.origin.get(node._sequence_nr(), ("", None))
            under = node._sequence_nr() in self._under
        else:
            module, line = recorder.module_path(), recorder.where.line(3)
            number = torch._C._autograd._get_sequence_nr() - 1
            if phase != STEP and number not in self.origin:  # what runs after it without a node of its own is not it
                # The node of a Function of Python has a number before the operations in its forward.
                for each in range(max(number - 8, 0), number + 1):
                    if each not in self.origin:
                        self.origin[each] = module, line
                        self._under |= {each} if autocast else set()
        if phase == LOOP:
            self._gradients.note(name, writes, args, inputs, result, line)
        elif phase == BACKWARD and kind in PRODUCTS and inputs:
            recorder.backward_dtypes.add(inputs[-1].dtype)
        elif node is not None and name.removesuffix("_") in CHANGING and node.name() == _ACCUMULATES:
            self._gradients.note_hook(name, args, getattr(node, "variable"))  # noqa: B009  # torch does not declare it
        if kind is REDUCE and inputs and inputs[0].is_floating_point():
            elements = sum(each.numel() for each in inputs[:1])
            recorder.note("reduce", line, op=name, dtype=inputs[0].dtype, elements=elements, phase=phase)
        dtypes = tuple(each.dtype for each in inputs[:4])
        out = output.dtype if output is not None else None
        operand = ""
        if kind is CAST and phase == FORWARD and isinstance(inputs[0], nn.Parameter):
            operand = recorder.names.param(inputs[0]) or ""
        key = func, phase, module, id(line), dtypes, out, autocast, under, operand
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = Op(name, kind, module, phase, dtypes, out, line, autocast)
            row.under, row.operand, row.via = under, operand, recorder.where.package(3)
        row.grad |= any(each.requires_grad for each in inputs)
        row.count += 1
        if output is not None:
            row.elements += output.numel()
            row.bytes += output.numel() * output.element_size()
        if kind is SOFTMAX and inputs and inputs[0].ndim:
            row.width = max(row.width, inputs[0].shape[-1])
        elif kind in (SUM, LOSS) and inputs and output is not None and output.numel():
            row.width = max(row.width, inputs[0].numel() // output.numel())
        if phase in (FORWARD, LOOP):
            self._by_hand.follow(row, inputs, outputs)
            self._values.see(row, inputs, output)
        if phase == FORWARD:
            self.flow.follow(func, row, inputs, outputs)
        to_half = kind is CAST and out in HALVES and phase in (FORWARD, LOOP)
        if to_half and phase == LOOP and line is not None and outputs[0].dim() and not inputs[0].dtype.is_complex:
            recorder.cast_to_half[storage(outputs[0])] = line
        if to_half and not torch.is_grad_enabled() and recorder.is_trained(inputs[0]):
            recorder.note("cast_without_gradients", line, name=recorder.names.param(inputs[0]))


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(tuple(value))
