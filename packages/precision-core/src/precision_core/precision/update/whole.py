"""Whole: a float32 placeholder of a full parameter, for optimizers that cannot step a piece of one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.precision.update.layout import alike, dense, flat, local
from precision_core.precision.update.noise import Place, index_of
from precision_core.precision.update.rows import row_of
from precision_core.precision.update.storage import Storage, wide_copy
from precision_core.scaling.scaler import Unscale, as_it_is


def widened(optimizer: Optimizer, storage: Storage, param: nn.Parameter, unscale: Unscale = as_it_is) -> nn.Parameter:
    """Returns a float32 placeholder of a whole parameter, with its gradient; it takes over the optimizer's state."""
    placeholder = nn.Parameter(wide_copy(storage, param), requires_grad=param.requires_grad)
    assert param.grad is not None
    is_wide = param.grad.dtype is torch.float32
    placeholder.grad = param.grad if is_wide else unscale(param, param.grad.float())
    vars(placeholder).update(vars(param))
    kept = {key: value for key, value in optimizer.state.get(param, {}).items() if key != storage.key}
    if kept:
        wide = {key: storage.state_dtype(key, value, param) is not None for key, value in kept.items()}
        optimizer.state[placeholder] = {key: value.float() if wide[key] else value for key, value in kept.items()}
    return placeholder


def narrowed(
    optimizer: Optimizer,
    storage: Storage,
    param: nn.Parameter,
    placeholder: nn.Parameter,
    numbers: Mapping[int, int],
) -> None:
    """Writes a placeholder of `widened` back into the parameter that it stood for, and its state."""
    stored, weight = storage.beside(param), local(param)
    written = dense(weight)
    place = Place(*place_of(param, numbers))
    values = flat(local(placeholder))
    besides = [] if stored is None else [flat(alike(local(stored), written))]
    storage.write(row_of(values), [flat(written)], besides, [place], row_of(torch.empty_like(values)))
    if written is not weight:
        weight.copy_(written)
    stepped = optimizer.state.pop(placeholder, None)
    if stepped is not None:
        for key, value in stepped.items():
            dtype = storage.state_dtype(key, value, param)
            if dtype is not None and value.dtype is not dtype:
                stepped[key] = torch.empty_like(value, dtype=dtype)
                storage.write_state(key, local(value), local(stepped[key]), place)
        optimizer.state[param] = stepped
    storage.written(param, stored)
    if storage.key is not None and stored is not None:
        optimizer.state[param][storage.key] = stored


def place_of(param: nn.Parameter, numbers: Mapping[int, int]) -> tuple[int, int, Tensor | None]:
    """Returns the number of `param`, and where its elements are in the full parameter."""
    return (numbers[id(param)], *index_of(param)) if numbers else (0, 0, None)
