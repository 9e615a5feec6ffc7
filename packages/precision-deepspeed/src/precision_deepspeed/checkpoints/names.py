"""What a checkpoint records of the model beside DeepSpeed's files: which parameter is which, by name."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer


def describe(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Returns names and shapes of a model that DeepSpeed has not changed yet.

    groups      the names in each of the optimizer's groups, in its order
    frozen      those that do not train
    shapes      name -> shape, of all parameters
    tied        other name -> name, where one parameter has several
    """
    names = {param: name for name, param in module.named_parameters()}
    return {
        "groups": [[names[param] for param in group["params"]] for group in optimizer.param_groups],
        "frozen": [name for param, name in names.items() if not param.requires_grad],
        "shapes": {name: tuple(getattr(param, "ds_shape", param.shape)) for param, name in names.items()},
        "tied": {
            other: names[param]
            for other, param in module.named_parameters(remove_duplicate=False)
            if other != names[param]
        },
    }
