"""Kinds of optimizers: which may step a piece of a parameter, which one parameter at a time, and which all at once."""

from __future__ import annotations

import enum
import inspect
from typing import Any

from torch import Tensor, optim
from torch.optim import Optimizer


class Kind(enum.Enum):
    """What an optimizer's step may be cut into."""

    PIECES = enum.auto()
    """Each element is stepped by itself."""
    PARAMETERS = enum.auto()
    """Each parameter is: factored moments, orthogonal updates."""
    WHOLE = enum.auto()
    """Unknown: all parameters at once, in float32."""


_NAMES = {
    Kind.PIECES: (
        *("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop"),
        *("Adagrad", "Adadelta", "ASGD", "Rprop"),
    ),
    Kind.PARAMETERS: ("Adafactor", "Muon", "SparseAdam"),
}
_KINDS: dict[Any, Kind] = {
    getattr(optim, name): kind for kind, names in _NAMES.items() for name in names if hasattr(optim, name)
}

COUNTERS = frozenset({"step", "eta", "mu", "mu_product"})
"""State of torch's optimizers that is one number a parameter."""

STEP = 64
"""Pieces are multiples of so many elements: torch's fused steps compute what is left of a vector in another way."""


def kind_of(optimizer: Optimizer) -> Kind:
    """Returns the kind of `optimizer`; a subclass of torch's is of its kind where it steps as that does."""
    for base in type(optimizer).__mro__:
        if base in _KINDS:
            same = all(_method(type(optimizer), name) is _method(base, name) for name in ("step", "_init_group"))
            return _KINDS[base] if same else Kind.WHOLE
    return Kind.WHOLE


def _method(kind: Any, name: str) -> Any:
    method = getattr(kind, name, None)
    return None if method is None else inspect.unwrap(method)  # torch wraps `step` of each class once


def check_optimizer(optimizer: Optimizer, mode: str) -> None:
    """Raises `ValueError` for an optimizer that cannot step parameters as `mode` stores them, with the way out."""
    name = type(optimizer).__name__
    if isinstance(optimizer, optim.LBFGS):
        raise ValueError(
            f"{mode} cannot step LBFGS, which evaluates its closure several times a step, in between with parameters "
            'that are in float32 only: use another optimizer, or precision="bf16-mixed"'
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            f"{mode} cannot step {name}(differentiable=True): the update of half parameters has no gradient; use "
            'precision="bf16-mixed"'
        )
    inner = [key for key, value in vars(optimizer).items() if isinstance(value, Optimizer) and value is not optimizer]
    if inner:
        raise ValueError(
            f"{mode} cannot step {name}, which steps by another optimizer ({name}.{inner[0]}), whose state it does not "
            f'see: give fabric.setup that one, or use precision="bf16-mixed"'
        )


def is_moment(key: object, value: object, param: Tensor) -> bool:
    """Whether a value in an optimizer's state is a moment of `param`, not a counter (or a scale of the whole)."""
    if key in COUNTERS or not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return bool(value.dim()) or not param.dim()
