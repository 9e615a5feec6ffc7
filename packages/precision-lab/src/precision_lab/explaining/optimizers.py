"""What an optimizer holds that is not finite, or that makes the next step so."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from precision_lab.explaining.explanation import Explanation, Remedy
from precision_lab.explaining.numbers import is_finite, numbers_of
from precision_lab.explaining.replay import Step


def explain_optimizer(step: Step, optimizer: Optimizer) -> Explanation | None:
    """Returns the explanation where the optimizer's state is not finite, or its epsilon is zero; else None."""
    names = {id(param): name for name, param in step.model.named_parameters()}
    for group in optimizer.param_groups:
        for param in group["params"]:
            name = names.get(id(param), "a parameter that the model does not have")
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor) and not is_finite(value):
                    return Explanation(
                        "optimizer state",
                        f"{type(optimizer).__name__}'s {key} of {name} is not finite: {numbers_of(value)}. The next "
                        "step makes the parameter so.",
                        "optimizer",
                        module=name.rpartition(".")[0],
                        name=f"{key} of {name}",
                        operands=[numbers_of(value)],
                    )
            eps = group.get("eps")
            if isinstance(eps, float) and eps and float(torch.tensor(eps, dtype=param.dtype)) == 0:
                dtype = str(param.dtype).removeprefix("torch.")
                return Explanation(
                    "optimizer's epsilon",
                    f"{type(optimizer).__name__}'s eps of {eps:g} is zero in {dtype}, the dtype of {name}: where "
                    "the second moment is zero, too, the step is 0 / 0.",
                    "optimizer",
                    module=name.rpartition(".")[0],
                    name=name,
                    remedies=[
                        Remedy("code", 'eps=1e-5, or precision="16-mixed" or "16-master"', "eps=1e-5"),
                    ],
                )
    return None
