"""What the tests share: threads, and what a GPU's kernels would be handed and make of it, where there is none.

To the layers the meta device is a GPU like any other: it is no CPU, and bitsandbytes says which shapes its operators
return there. It has no values; those are computed on the CPU by `ByPointer` and `Elsewhere`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import bitsandbytes  # noqa: F401 - as a whole, before a test in which warnings are errors breaks its import off
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# The tests' tensors are tiny, and on a busy machine threads that wait for each other take minutes.
torch.set_num_threads(1)


def tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@dataclass
class Call:
    """An operator that was called, `bitsandbytes::int8_scaled_mm` for example, and its tensors."""

    name: str
    given: list[Tensor]
    returned: list[Tensor] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """A context whose `calls` are the operators that ran in it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func.name(), tensors_in((args, kwargs)))
        result = self.compute(func, args, kwargs or {})
        call.returned = tensors_in(result)
        self.calls.append(call)
        return result

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def operands(self, start: str) -> list[Tensor]:
        """Returns what the operators whose names start so were given."""
        return [tensor for call in self.calls if call.name.startswith(start) for tensor in call.given]

    @property
    def copies(self) -> list[Call]:
        """Copies from one device to another."""
        return [call for call in self.calls if len({each.device for each in (*call.given, *call.returned)}) > 1]


class ByPointer(Recorder):
    """A context in which bitsandbytes' int8 kernels read as CUDA's: by pointer and shape, whatever the strides."""

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.name()
        if name == "bitsandbytes::int8_double_quant":  # which bitsandbytes has for GPUs only: rows, then columns
            (values,) = args
            rows, row_scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(values)
            column_scales = values.abs().amax(0).float()
            columns = values.mul(127.0).div(column_scales).round().to(torch.int8)
            return rows, columns, row_scales, column_scales, None
        if name.startswith("bitsandbytes::int8_"):
            args, kwargs = tree_map_only(Tensor, _by_pointer, (args, kwargs))
        return func(*args, **kwargs)


def _by_pointer(tensor: Tensor) -> Tensor:
    return tensor.as_strided(tensor.shape, torch.empty(tensor.shape, device="meta").stride())


class Elsewhere(TorchDispatchMode):
    """A context in which the meta device is a GPU that computes as the CPU does.

    `quantised` are the sizes of what it quantised there, and `here` of what was quantised on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.quantised: list[int] = []
        self.here: list[int] = []
        self._sent: list[Tensor] = []  # kept, so that no other tensor takes the place of one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, given = dict(kwargs or {}), tensors_in(args)
        goes = kwargs.get("device") == torch.device("meta")
        if goes:
            kwargs["device"] = torch.device("cpu")
        is_there = any(each is sent for each in given for sent in self._sent)
        if func.name() in ("bitsandbytes::quantize_4bit", "bitsandbytes::int8_vectorwise_quant"):
            (self.quantised if is_there else self.here).append(given[0].numel())
        result = func(*args, **kwargs)
        if goes or is_there:
            self._sent += tensors_in(result)
        return result


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def by_pointer() -> ByPointer:
    return ByPointer()


@pytest.fixture
def elsewhere() -> Elsewhere:
    return Elsewhere()
