"""Second-order gradients are refused by name: FSDP frees gathered parameters after the first backward.

The second one then meets parameters without memory ("setStorage: ... out of bounds for storage of size 0"), or adds to
gradients that were reduced before. Autograd runs hooks with gradients enabled exactly where it records
a graph of its own, so a hook on the outputs sees it before FSDP gathers anything. Under `torch.func` it always records
one; there a second `grad` around the forward is one too many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from precision_core.policy import map_tensors

_WHY = (
    "{call}: second-order gradients (gradient penalties, Hessian-vector products) need the parameters in both "
    'backwards, and FSDP frees the gathered ones after the first. Use strategy="ddp", or DeepSpeedStrategy(stage=2) '
    "of precision-deepspeed, where they are right. {changed} [second-order]"
)
_NOTHING = "Nothing was changed"


def check_first_order(kwargs: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the arguments of a backward that records a graph of its own."""
    if kwargs.get("create_graph"):
        raise ValueError(_WHY.format(call="fabric.backward(loss, create_graph=True)", changed=_NOTHING))


def explained(error: BaseException) -> RuntimeError | None:
    """Returns an error that names second order where a backward failed of freed parameters; None: of something else.

    It does on what `torch.func.grad`, `vjp` and `jacrev` return, whose graph torch records without being asked.
    """
    if not isinstance(error, RuntimeError) or "out of bounds for storage of size 0" not in str(error):
        return None
    return _of_function()


def _of_function() -> RuntimeError:
    call = "fabric.backward of what torch.func (grad, vjp, jacrev) made of the model"
    return RuntimeError(_WHY.format(call=call, changed="The gradients of this step are dropped"))


def first_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a module's method that raises `RuntimeError` where second-order gradients of it begin."""

    @wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        transforms = _transforms()
        if transforms > 1:
            raise RuntimeError(_WHY.format(call="torch.func.grad of torch.func.grad", changed=_NOTHING))
        output = function(*args, **kwargs)
        # Under a transform, torch records a graph also where nobody asked for it.
        map_tensors(output, _watch_value if transforms else _watch)
        return output

    return method


def _watch(tensor: Tensor) -> Tensor:
    if tensor.grad_fn is not None:
        tensor.register_hook(_check)
    return tensor


def _watch_value(tensor: Tensor) -> Tensor:
    """Watches the value inside a transform: its graph has none of FSDP's hooks, which would reduce gradients."""
    value = tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    if value.grad_fn is not None:
        value.register_hook(_refuse)
    return tensor


def _refuse(gradient: Tensor) -> None:
    raise _of_function()


def _check(gradient: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(_WHY.format(call="torch.autograd.grad(..., create_graph=True)", changed=_NOTHING))


def _transforms() -> int:
    """Returns how many `torch.func.grad` (`vjp`, `jacrev`) are at work; torch has no public name that says so."""
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is None:
        return 0
    return sum(each.key() == functorch.TransformType.Grad for each in functorch.get_interpreter_stack() or ())
