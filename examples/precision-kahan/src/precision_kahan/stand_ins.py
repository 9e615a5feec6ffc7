"""One step in float32: the optimizer steps stand-ins for its bfloat16 parameters, whatever optimizer it is.

A stand-in is a float32 `Parameter` with the value, the lost part, the gradient, the optimizer state and the attributes
of the one it stands for. `param.data = param.float()` would be shorter, but a parameter that changes its dtype gets a
new gradient accumulator: hooks on the old one are silently never called again. Ours are written in place, and only
after the step: if the optimizer raises, they and their state are as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.policy import map_tensors
from precision_kahan.compensation import Compensation


@contextmanager
def stand_ins(optimizer: Optimizer, compensation: Compensation) -> Iterator[None]:
    """Context in which the bfloat16 parameters of `optimizer` that have a gradient are replaced by float32 stand-ins.

    Afterwards the parameters hold the rounded result, `compensation` what that took, and state is bfloat16 again.

    Raises:
        ValueError: a parameter that is no plain tensor.
        RuntimeError: the optimizer wrote to parameters that it holds beside its groups.
    """
    lists: list[list[nn.Parameter]] = [group["params"] for group in optimizer.param_groups]
    originals = [list(params) for params in lists]
    pairs: list[tuple[nn.Parameter, nn.Parameter, int]] = []
    states: dict[Tensor, Any] = {}
    try:
        for params in lists:
            for index, param in enumerate(params):
                if param.dtype is not torch.bfloat16 or param.grad is None:
                    continue
                params[index] = stand_in = _stand_in(param, compensation)  # in place: some optimizers keep the list
                pairs.append((param, stand_in, param._version))
                if param in optimizer.state:
                    states[param] = optimizer.state.pop(param)
                    optimizer.state[stand_in] = {key: map_tensors(v, _widen) for key, v in states[param].items()}
        yield
        if any(param._version != version for param, _, version in pairs):
            raise RuntimeError(
                f"bf16-kahan: {type(optimizer).__name__} wrote to parameters that it holds beside its param_groups, "
                "which have no compensation: use bf16-true or 32-true with it"
            )
        for param, stand_in, _ in pairs:
            compensation.split(param, stand_in.detach())
            if stand_in.grad is None:  # a hook of the optimizer called zero_grad
                param.grad = None
            if stand_in in optimizer.state:
                states[param] = {
                    key: value if key == "step" else map_tensors(value, _narrow)
                    for key, value in optimizer.state[stand_in].items()
                }
    finally:
        for params, original in zip(lists, originals, strict=True):
            params[:] = original
        for _, stand_in, _ in pairs:
            optimizer.state.pop(stand_in, None)
        optimizer.state.update(states)


def _stand_in(param: nn.Parameter, compensation: Compensation) -> nn.Parameter:
    if type(param.data) is not Tensor:
        raise ValueError(
            f"bf16-kahan compensates plain tensors, not a {type(param.data).__name__}: it runs on one device only; "
            "bf16-mixed keeps float32 parameters everywhere"
        )
    stand_in = nn.Parameter(compensation.widen(param), requires_grad=param.requires_grad)
    assert param.grad is not None
    stand_in.grad = param.grad.float()
    vars(stand_in).update(vars(param))
    return stand_in


def _widen(value: Tensor) -> Tensor:
    """Returns a float32 copy of bfloat16 state, a copy of a single number, and anything else as it is."""
    if type(value) is Tensor and value.dtype is torch.bfloat16:
        return value.float()
    return value.clone() if type(value) is Tensor and value.dim() == 0 else value


def _narrow(value: Tensor) -> Tensor:
    """Returns state as bfloat16 parameters have it; single numbers, which count for the whole tensor, stay float32."""
    is_plain = type(value) is Tensor and value.dtype is torch.float32 and value.dim() > 0
    return value.bfloat16() if is_plain else value
