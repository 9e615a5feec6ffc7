"""Converting a module's parameters and buffers, one tensor at a time, so that it needs one more at most.

Parameters stay the same objects (an optimizer made before still holds them) and tied ones stay tied.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from precision_core.policy.casting import cast_dtype, cast_tensor
from precision_core.precision.model.report import Item

ParamDtype = Callable[[str, nn.Parameter], torch.dtype | None]
BufferDtype = Callable[[str, Tensor], torch.dtype | None]


def cast_parameters(module: nn.Module, dtype_of: ParamDtype) -> list[Item]:
    """Casts every parameter, and its gradient if there is one, to `dtype_of(name, param)`; None leaves it as it is.

    So does a tensor subclass that has one dtype only, as torchao's packed weights.
    """
    items = []
    for name, param in module.named_parameters():
        dtype = dtype_of(name, param)
        if dtype is None or cast_dtype(param.dtype, dtype) is param.dtype:
            continue
        new = cast_tensor(param.data, dtype)
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
    """Returns those that `cast_parameters` was to cast and that have stayed as they were."""
    return [
        Item(name, f"{type(param).__name__} has one dtype, {str(param.dtype).removeprefix('torch.')}")
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
    return f"{str(tensor.dtype).removeprefix('torch.')} -> {str(dtype).removeprefix('torch.')}"
