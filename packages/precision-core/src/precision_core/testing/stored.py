"""Stored: what shows that a master is float32, bit for bit: torch's optimizers, on parameters of awkward shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from precision_core.precision.half import HalfPrecision
from precision_core.precision.update import rows

Make = Callable[[Iterable[nn.Parameter]], Optimizer]

_ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95)}

OPTIMIZERS: dict[str, Make] = {
    "SGD": partial(optim.SGD, lr=1e-2),
    "SGD momentum": partial(optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "SGD nesterov, foreach": partial(optim.SGD, lr=1e-2, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": partial(optim.SGD, lr=1e-2, momentum=0.9, fused=True),
    "Adam": partial(optim.Adam, amsgrad=True, **_ADAM),
    "Adam foreach": partial(optim.Adam, weight_decay=0.1, foreach=True, **_ADAM),
    "Adam fused": partial(optim.Adam, weight_decay=0.1, fused=True, **_ADAM),
    "AdamW": partial(optim.AdamW, **_ADAM),
    "AdamW foreach": partial(optim.AdamW, foreach=True, **_ADAM),
    "AdamW fused": partial(optim.AdamW, fused=True, **_ADAM),
    "Adamax": optim.Adamax,
    "NAdam": partial(optim.NAdam, decoupled_weight_decay=True, weight_decay=0.1),
    "RAdam": partial(optim.RAdam, foreach=True),
    "RMSprop": partial(optim.RMSprop, lr=1e-3, momentum=0.9, centered=True),
    "Adagrad": optim.Adagrad,
    "Adagrad fused": partial(optim.Adagrad, fused=True),
    "Adadelta": partial(optim.Adadelta, maximize=True),
    "ASGD": partial(optim.ASGD, t0=2),
    "Rprop": optim.Rprop,
    "Adafactor": optim.Adafactor,
}
"""Every optimizer of torch that steps dense gradients without calling its closure again, in its forms."""


def muon(params: Iterable[nn.Parameter]) -> Optimizer:
    """Returns torch's Muon, for the matrices among `params`."""
    return optim.Muon([param for param in params if param.dim() == 2], lr=1e-2)


if hasattr(optim, "Muon"):
    OPTIMIZERS["Muon"] = muon

FORMS: dict[str, Make] = {
    "SGD nesterov": partial(optim.SGD, lr=1e-2, momentum=0.9, nesterov=True, foreach=False),
    "SGD foreach": partial(optim.SGD, lr=1e-2, weight_decay=0.1, foreach=True),
    "Adam amsgrad, fused": partial(optim.Adam, amsgrad=True, fused=True, **_ADAM),
    "Adamax foreach": partial(optim.Adamax, weight_decay=0.1, foreach=True),
    "NAdam foreach": partial(optim.NAdam, foreach=True),
    "RAdam": partial(optim.RAdam, weight_decay=0.1),
    "RMSprop foreach": partial(optim.RMSprop, lr=1e-3, momentum=0.9, centered=True, foreach=True),
    "Adagrad foreach": partial(optim.Adagrad, lr_decay=0.1, foreach=True),
    "Adadelta foreach": partial(optim.Adadelta, foreach=True),
    "ASGD foreach": partial(optim.ASGD, t0=2, foreach=True),
    "Rprop foreach": partial(optim.Rprop, foreach=True),
    "Adafactor foreach": partial(optim.Adafactor, weight_decay=0.1, foreach=True),
}
"""The same optimizers in the form that `OPTIMIZERS` leaves out."""


class Model(nn.Module):
    """Parameters that are cut at odd places: matrices, a vector, channels last, a scalar, one element, a frozen one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = [(70, 130), (64,), (3, 5, 7, 2), (), (1,), (200, 65)]
        self.values = nn.ParameterList(nn.Parameter(torch.randn(each, generator=generator) * 0.1) for each in shapes)
        self.values[2].data = self.values[2].data.to(memory_format=torch.channels_last)
        self.frozen = nn.Parameter(torch.randn(10, generator=generator), requires_grad=False)


def give_gradients(params: Iterable[nn.Parameter], seed: int) -> None:
    """Sets the gradients of step `seed`, values of bfloat16, in the dtype of each parameter."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        if param.requires_grad:
            gradient = torch.randn(param.shape, generator=generator).bfloat16()
            param.grad = torch.empty_like(param).copy_(gradient)


def masters(precision: HalfPrecision, params: Iterable[nn.Parameter]) -> list[Tensor]:
    """Returns the float32 values of parameters, as an optimizer would step them."""
    return [precision.masters.value(param) for param in params]


def equal(mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> bool:
    """Whether tensors are alike, bit for bit."""
    return all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.contiguous().view(-1), b.contiguous().view(-1))
        for a, b in zip(mine, theirs, strict=True)
    )


def cut_small_models() -> None:
    """Has this process step small models in pieces, as it does large ones, instead of all at once."""
    rows._LEAST_BYTES = 0
