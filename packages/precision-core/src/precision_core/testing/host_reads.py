"""Host reads: where a step waits for the device since Python asks for a value. Counted on a CPU that plays the device.

with HostReads(optimizer) as reads:
    step()
assert reads.lines == []
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_READS: Mapping[Any, str] = {
    aten._local_scalar_dense: "item",  # float(x), int(x), bool(x), `if x`, is_nonzero and allclose come down to it
    aten.equal: "equal",
    aten.is_nonzero: "is_nonzero",
    aten.allclose: "allclose",
    aten.nonzero: "nonzero",
    aten.masked_select: "masked_select",
    aten._unique2: "unique",
    aten.unique_dim: "unique",
    aten.unique_consecutive: "unique",
    aten.bincount: "bincount",
}
"""Operators that need a value, or whose result has a shape that depends on values."""
_INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)  # by a mask; masked_fill needs no value
_MASKS = (torch.bool, torch.uint8)

_MOVES: Mapping[Any, str] = {
    Tensor.cpu: "cpu",
    Tensor.tolist: "tolist",
    Tensor.numpy: "numpy",
    Tensor.__array__: "numpy",
    Tensor.__repr__: "repr",
}
"""What no operator is called for where the tensor is on a CPU already."""

_IS_CPU: Any = Tensor.is_cpu.__get__  # type: ignore[attr-defined]  # a new object each time, equal to the others
_TORCH = str(Path(torch.__file__).parent)


class HostReads:
    """Counts, while it is entered, reads of tensors' values by the host; each with the line outside of torch.

    `.to("cpu")` counts by the string: `.to(device)` with a `torch.device` is a move to what plays the device, and no
    tensor `is_cpu`, so that code which reads values on a CPU alone leaves that out. The `step` of `optimizers` does not
    count: torch keeps it in host memory on every device, unless they are fused or capturable. It sees this thread
    alone, in which backward runs on a CPU, too, and nothing inside of operators that other libraries register.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self.lines: list[str] = []
        """Of each read: "path:line function: what"."""
        self._optimizers = optimizers
        self._modes = (_Moves(self), _Operators(self))

    def __len__(self) -> int:
        return len(self.lines)

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)  # type: ignore[no-untyped-call]

    def note(self, what: str, tensor: Any) -> None:
        """Notes a read, unless it is of a value that is the host's."""
        if not self._is_hosts(tensor):
            self.lines.append(f"{_caller()}: {what}")

    def _is_hosts(self, tensor: Any) -> bool:
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            return True
        return any(
            optimizer.state[param].get("step") is tensor
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            if not (group.get("fused") or group.get("capturable"))
            for param in group["params"]
            if param in optimizer.state
        )


class _Moves(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_CPU:
            return False
        if func in _MOVES:
            self._reads.note(_MOVES[func], args[0])
        elif func is Tensor.to and any(isinstance(each, str) and each == "cpu" for each in (*args, *kwargs.values())):
            self._reads.note('to("cpu")', args[0])
        elif func is torch.tensor and isinstance(args[0], (list, tuple)):
            for each in args[0]:
                self._reads.note("item", each)
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # the operators that a DTensor's comes down to are seen
        packet = getattr(func, "overloadpacket", func)
        kwargs = kwargs or {}
        if packet in _READS:
            self._reads.note(_READS[packet], args[0])
        elif packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            self._reads.note("repeat_interleave", args[0])
        elif packet in _INDEXED:
            for mask in [each for each in args[1] if isinstance(each, Tensor) and each.dtype in _MASKS][:1]:
                self._reads.note("mask", mask)
        return func(*args, **kwargs)


def _caller() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename in (__file__, "<string>") or frame.f_code.co_filename.startswith(_TORCH)
    ):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
