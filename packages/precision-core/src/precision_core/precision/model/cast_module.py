"""Casting a module's parameters and buffers, one tensor at a time: memory for one more tensor is enough.

Parameters stay the same objects (an optimizer made before still holds them) and tied ones stay tied. `parameters_in`
casts each as it is registered, while its module is built.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from precision_core.policy.casting import cast, cast_dtype, cast_tensor, map_tensors
from precision_core.policy.dtypes import HALF_DTYPES, dtype_name
from precision_core.precision.model.aligned import tensors
from precision_core.precision.model.default_dtype import created_as
from precision_core.precision.model.report import Item

ParamDtype = Callable[[str, nn.Parameter], torch.dtype | None]
BufferDtype = Callable[[str, Tensor], torch.dtype | None]

_NO_KERNEL = ("not implemented for", "Low precision dtypes", "of float, double, cfloat or cdouble types")
"""What torch says where it has no kernel for a dtype."""


def cast_parameters(
    module: nn.Module,
    dtype_of: ParamDtype,
    cast_param: Callable[[str, nn.Parameter, torch.dtype], Tensor] | None = None,
) -> list[Item]:
    """Casts every parameter, and its gradient if there is one, to `dtype_of(name, param)`; None leaves it as it is.

    A tensor subclass that has one dtype only, as torchao's packed weights, stays as it is, too. `cast_param` returns
    what a parameter becomes, where that is not torch's cast.
    """
    items = []
    for name, param in module.named_parameters():
        dtype = dtype_of(name, param)
        if dtype is None or cast_dtype(param.dtype, dtype) is param.dtype:
            continue
        new = cast_tensor(param.data, dtype) if cast_param is None else cast_param(name, param, dtype)
        if new.dtype is param.dtype:
            continue
        items.append(Item(name, _change(param, dtype)))
        gradient, param.grad = param.grad, None
        if is_traceable_wrapper_subclass(param):  # which holds others: setting .data leaves those as they were
            swapped = nn.Parameter(new, requires_grad=param.requires_grad)
            vars(swapped).update(vars(param))
            torch.utils.swap_tensors(param, swapped)
        else:
            param.data = new
        if gradient is not None:
            param.grad = cast_tensor(gradient, dtype)
    for child in module.modules():
        if isinstance(child, nn.RNNBase):
            child.flatten_parameters()  # cuDNN wants them in one block again
    return items


def packed_parameters(module: nn.Module, dtype_of: ParamDtype) -> list[Item]:
    """Returns the parameters that `cast_parameters` had to leave in their dtype: tensor subclasses with one only."""
    return [
        Item(name, f"{type(param).__name__} has one dtype, {dtype_name(param.dtype)}")
        for name, param in module.named_parameters()
        if (dtype := dtype_of(name, param)) is not None and cast_dtype(param.dtype, dtype) is not param.dtype
    ]


def cast_buffers(module: nn.Module, dtype_of: BufferDtype) -> tuple[list[Item], list[str]]:
    """Casts every buffer to `dtype_of(name, buffer)`; None leaves it as it is.

    Returns the items for the report, and the names of buffers whose values changed by the cast.
    """
    items, changed = [], []
    slots: dict[int, list[tuple[nn.Module, str, str]]] = {}  # a buffer that two modules share stays shared
    for prefix, child in module.named_modules():
        for key, buffer in child._buffers.items():
            if buffer is not None:
                slots.setdefault(id(buffer), []).append((child, key, f"{prefix}.{key}" if prefix else key))
    for holders in slots.values():
        child, key, name = holders[0]
        before = child._buffers[key]
        assert before is not None
        dtype = dtype_of(name, before)
        after = before if dtype is None else cast_tensor(before, dtype)
        if after is before:
            continue
        items.append(Item(name, _change(before, after.dtype)))
        if _loses(before, after):
            changed.append(name)
        for child, key, _ in holders:
            child._buffers[key] = after
    return items, changed


def _loses(before: Tensor, after: Tensor) -> bool:
    """Whether the cast changed a value; meta tensors have none, so they count as changed by any narrowing."""
    if torch.promote_types(before.dtype, after.dtype) is after.dtype:
        return False
    if before.is_meta or is_lazy(before):
        return True
    before, after = _values(before), _values(after)
    return not bool(((after.to(before.dtype) == before) | before.isnan()).all())


def _values(tensor: Tensor) -> Tensor:
    """Returns the values that a sparse tensor stores; a dense one is its own."""
    if tensor.layout is torch.strided:
        return tensor
    return tensor._values() if tensor.is_sparse else tensor.values()


def _change(tensor: Tensor, dtype: torch.dtype) -> str:
    return f"{dtype_name(tensor.dtype)} -> {dtype_name(dtype)}"


class _Float32WhereNeeded(TorchFunctionMode):
    """Context in which calls for which torch has no half kernel (factorisations, `nn.init.orthogonal_`) use float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:  # NotImplementedError is one
            halves = {t.dtype for t in tensors((args, kwargs)) if t.dtype in HALF_DTYPES}
            if not halves or not any(words in str(error) for words in _NO_KERNEL):
                raise
        (half,) = halves if len(halves) == 1 else (torch.float32,)
        wide: dict[Tensor, Tensor] = {}
        wide_args, wide_kwargs = map_tensors(
            (args, kwargs), lambda t: wide.setdefault(t, t.float()) if t.dtype in halves else t
        )
        result = func(*wide_args, **wide_kwargs)
        if getattr(func, "__name__", "").endswith("_"):
            for tensor, new in wide.items():  # in-place functions: their result
                tensor.copy_(new)
            return args[0]
        return map_tensors(result, lambda t: t.to(half) if t.dtype is torch.float32 else t)


@contextmanager
def parameters_in(dtype: torch.dtype) -> Iterator[None]:
    """Casts each floating parameter that this thread registers on a module, from float32 in which it is drawn.

    Initialisers that torch has no half kernel for run in float32, and what they return is rounded.
    """
    thread = threading.get_ident()

    def hook(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        if threading.get_ident() == thread and param is not None:
            param.data = cast(param.data, dtype)
        return param

    handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]
    try:
        drawn = nullcontext() if torch.get_default_dtype() is torch.float32 else created_as(torch.float32)
        with drawn, _Float32WhereNeeded():
            yield
    finally:
        handle.remove()
