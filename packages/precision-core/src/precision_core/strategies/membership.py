"""Which optimizer steps which model: one made over another model, or over a copy, would train nothing here.

And whether what a call was given is a model, or an optimizer, at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from precision_core.scaling.gradients import params_of


def check_module(call: str, value: Any, instead: str) -> None:
    """Raises `ValueError` where `value` is no module; the message names the user's call, and says what to pass."""
    if not isinstance(value, nn.Module):
        raise ValueError(f"{call} expected a torch.nn.Module, got a {type(value).__name__}: {instead}")


def check_optimizer(call: str, value: Any) -> None:
    """Raises `ValueError` where `value` is no optimizer; the message names the user's call, and says what to pass."""
    if not hasattr(value, "param_groups"):
        several = " once for each of them" if isinstance(value, (list, tuple)) else ""
        raise ValueError(
            f"{call} expected a torch optimizer, got a {type(value).__name__}: call it{several} with what "
            "fabric.setup(model, optimizer) was given"
        )


def check_together(
    model: nn.Module, optimizers: Sequence[Optimizer], known: Container[nn.Parameter], held: Container[int]
) -> None:
    """Raises `ValueError` for an optimizer that has nothing to do with the model that it is set up with.

    That is one which holds parameters, none of `model` and none that is `known` from models set up before, where no
    optimizer steps the model: neither one of `optimizers` nor one that was set up before, whose parameters' ids are
    `held`. Tensors that are no parameters are anybody's own affair.
    """
    trained = {id(param) for param in model.parameters() if param.requires_grad}
    if not trained or any(id(param) in trained for each in optimizers for param in params_of(each)):
        return
    foreign = [each for each in optimizers if _is_foreign(each, {id(param) for param in model.parameters()}, known)]
    if foreign and not any(param in held for param in trained):
        kind, name = type(foreign[0]).__name__, type(model).__name__
        raise ValueError(
            f"fabric.setup got a {kind} that holds no parameter of this {name}, nor of another model that was set up, "
            f"so nothing would train the {name}: make the {kind} over this very model's parameters(), not those of a "
            "copy or of another model. One that belongs to no model is set up by fabric.setup_optimizers(optimizer); a "
            "model that is not to train is frozen by requires_grad_(False) [foreign-optimizer]"
        )


def warn_apart(
    optimizers: Sequence[Optimizer], models: Iterable[nn.Module], known: Container[nn.Parameter], held: Container[int]
) -> None:
    """Warns of optimizers that hold parameters of no model that was set up, where such a model has no optimizer."""
    ours = {id(param) for each in optimizers for param in params_of(each)}
    foreign = [each for each in optimizers if _is_foreign(each, (), known)]
    for model in models if foreign else ():
        trained = [id(param) for param in model.parameters() if param.requires_grad]
        if trained and not any(param in held or param in ours for param in trained):
            kind, name = type(foreign[0]).__name__, type(model).__name__
            warnings.warn(
                f"fabric.setup_optimizers got a {kind} that holds no parameter of a model that was set up, and no "
                f"optimizer holds those of the {name}: make the {kind} over the parameters() of what fabric.setup "
                f"returned. If the {name} is not to train, freeze it by requires_grad_(False) [foreign-optimizer]",
                stacklevel=4,
            )
            return


def _is_foreign(optimizer: Optimizer, ours: Container[int], known: Container[nn.Parameter]) -> bool:
    """Whether it holds parameters, and nothing that is ours, known, or no parameter of a module."""
    params = list(params_of(optimizer))
    return bool(params) and all(
        isinstance(param, nn.Parameter) and id(param) not in ours and param not in known for param in params
    )
