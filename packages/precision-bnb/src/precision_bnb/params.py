"""The parameter of a quantised layer: bitsandbytes' own class, whose memory is one tensor of packed bytes.

What stores, moves, shards or sends it sees packed bytes: `shape`, `detach()`, `nbytes`, `state_dict()`. What was
written for bitsandbytes sees its codes: `data`, `numel()`, `quant_state`, `CB`, `SCB`, and bitsandbytes' operators are
handed them. peft asks for the names of these two classes.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from operator import attrgetter
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from precision_bnb.loading import packed_4bit, packed_int8
from precision_bnb.packed import Layout
from precision_bnb.quantizing import quantize
from precision_bnb.views import Views

_MEMORY: Any = Tensor.data
"""torch's own property, which `data` hides."""


class _Packed(nn.Parameter):
    """What both classes have in common; `_layout` says what is where, `_floats` the dtype that was quantised."""

    vendors: type[nn.Parameter]
    _layout: Layout
    _floats: torch.dtype

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """What is made anew, as peft does by `type(weight)(floats)`, is bitsandbytes' own until a layer takes it."""
        return cls.vendors(*args, **kwargs)

    @property
    def data(self) -> Tensor:
        """The codes, as a view, in the shape that bitsandbytes has them in; setting it takes codes, or packed bytes."""
        memory: Tensor = _MEMORY.__get__(self)
        return self._codes(memory) if self._fits(memory) else memory

    @data.setter
    def data(self, value: Tensor) -> None:
        codes = self.data
        if (value.shape, value.dtype) == (codes.shape, codes.dtype) and value.shape != self.shape:
            memory = _MEMORY.__get__(self).to(value.device, copy=True)
            self._codes(memory).copy_(value)
            value = memory
        _MEMORY.__set__(self, value)

    def numel(self) -> int:
        """The number of codes, in elements of the storage dtype: what counts a model's parameters doubles it."""
        memory: Tensor = _MEMORY.__get__(self)
        return self._codes(memory).numel() if self._fits(memory) else memory.numel()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Moves it to a device; a dtype is left aside, for a cast would destroy it."""
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        memory = self.detach()
        moved = memory if device is None else memory.to(device, non_blocking=non_blocking)
        return self if moved is memory else _as(type(self), nn.Parameter(moved, False), self._layout, self._floats)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memory = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
            memo[id(self)] = _as(type(self), memory, self._layout, self._floats)
        return memo[id(self)]

    def __copy__(self) -> Any:
        return copy.deepcopy(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a plain parameter, which `weights_only` takes; the layer that holds it makes it one of these again."""
        return torch._utils._rebuild_parameter, (self.detach(), self.requires_grad, OrderedDict())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if _is_vendors(func, args):
                args = tuple(each.data if isinstance(each, _Packed) else each for each in args)
            return func(*args, **(kwargs or {}))

    def _fits(self, memory: Tensor) -> bool:
        return memory.shape == self._layout.shape and memory.dtype is self._layout.format.storage

    def _codes(self, memory: Tensor) -> Tensor:
        raise NotImplementedError


def _is_vendors(func: Any, args: Any) -> bool:
    """Whether a function is handed the codes: bitsandbytes' operators, and how `matmul_4bit` and its callers begin."""
    if isinstance(func, torch._ops.OpOverload):
        return func.namespace == "bitsandbytes"
    return func is Tensor.t or (func is Tensor.view and args[1:] == (-1, 1))


class Params4bit(_Packed, bnb.nn.Params4bit):
    """Packed 4-bit weights, as bitsandbytes' parameter."""

    vendors = bnb.nn.Params4bit

    def _codes(self, memory: Tensor) -> Tensor:
        codes, storage = self._layout.parts(memory).codes, memory.dtype
        return (codes.view(storage) if codes.numel() % storage.itemsize == 0 else codes).view(-1, 1)

    @property
    def quant_state(self) -> Any:
        """bitsandbytes' description: views of what is packed beside the codes."""
        return Views(self, self._layout).state(self._floats)[1]

    # Where bitsandbytes looks these up there is nothing: it keeps its state in `__dict__`.
    absmax = property(attrgetter("quant_state.absmax"))
    code = quant_map = property(attrgetter("quant_state.code"))
    offset = nested_offset = property(attrgetter("quant_state.offset"))
    state2 = property(attrgetter("quant_state.state2"))
    nested_absmax = property(attrgetter("quant_state.state2.absmax"))
    nested_blocksize = property(attrgetter("quant_state.state2.blocksize"))
    nested_quant_map = property(attrgetter("quant_state.state2.code"))
    nested_dtype = property(attrgetter("quant_state.state2.dtype"))


class Int8Params(_Packed, bnb.nn.Int8Params):
    """Packed 8-bit weights, as bitsandbytes' parameter."""

    vendors = bnb.nn.Int8Params

    def _codes(self, memory: Tensor) -> Tensor:
        return self._layout.parts(memory).codes

    CB = property(attrgetter("data"))

    @property
    def SCB(self) -> Tensor:
        """The scales (rows,), a view."""
        return self._layout.parts(self.detach()).scales


def is_packed(param: Any) -> bool:
    """Whether a parameter is packed weights, not sharded."""
    return isinstance(param, _Packed)


def as_packed(param: nn.Parameter, layout: Layout, floats: torch.dtype) -> nn.Parameter:
    """Returns the parameter of a layer of that layout: `param` itself, of a class above where it is packed weights.

    bitsandbytes' own parameters are packed. `floats` is the dtype that bitsandbytes dequantises to. What has another
    shape or dtype, or is sharded, stays as it is.

    Raises:
        ValueError: a parameter of bitsandbytes that is quantised in another way.
    """
    kind: type[_Packed] = Int8Params if layout.format.quant_type == "int8" else Params4bit
    if isinstance(param, kind.vendors) and not is_packed(param):
        param = nn.Parameter(_pack(param, layout), requires_grad=False)
    fits = param.shape == layout.shape and param.dtype is layout.format.storage
    return _as(kind, param, layout, floats) if type(param) is nn.Parameter and fits else param


def _as(kind: type[_Packed], param: nn.Parameter, layout: Layout, floats: torch.dtype) -> nn.Parameter:
    """Makes a plain parameter one of `kind`, the same object: optimizers and tied layers may hold it."""
    new: Any = param
    new.__class__ = kind
    new._layout, new._floats, format = layout, floats, layout.format
    if kind is Int8Params:
        new.has_fp16_weights = False
    else:  # what peft passes on as keywords when it quantises merged weights
        new.blocksize, new.quant_type, new.quant_storage = format.block_size, format.quant_type, format.storage
        new.compress_statistics, new.bnb_quantized, new.module = format.double_quant, True, None
    return param


def _pack(param: Any, layout: Layout) -> Tensor:
    """Returns bitsandbytes' parameter, packed; it may still be floats."""
    if param.is_floating_point() and getattr(param, "quant_state", None) is None:
        return quantize(param.detach(), layout.format)
    if layout.format.quant_type == "int8":
        return packed_int8(layout, param.data if param.CB is None else param.CB, param.SCB)
    return packed_4bit(layout, param.data, param.quant_state)
