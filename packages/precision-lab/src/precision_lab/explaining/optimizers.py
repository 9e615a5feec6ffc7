"""An optimizer's part in it: what it holds that is not finite, and what its last step did of finite gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from precision_lab.explaining.before import Before
from precision_lab.explaining.explanation import Explanation, Remedy
from precision_lab.explaining.numbers import is_finite, local, numbers_of
from precision_lab.explaining.replay import Step

OPTIMIZER = "optimizer"
"""The phase of all of these."""
GRADIENTS = "gradients that were not finite"
_JUMP = 5.0
"""A learning rate that is so many times the usual one has jumped."""
_BETTER = 0.1
"""A remedy of a step that was finite makes its largest update less than this share."""
_EPS = ("1e-6", "1e-5", "1e-4", "1e-3")
_STEPS_OF_RATE = 10.0
"""Adam's update is about the learning rate: with an epsilon that is large enough it is not above so many times that."""
_HALVES = (torch.float16, torch.bfloat16)
_MASTER = 'precision="16-mixed" or "16-master"'


def explain_optimizer(step: Step, optimizer: Optimizer) -> Explanation | None:
    """Returns the explanation where the optimizer's state is not finite, or its epsilon is zero; else None."""
    names = {id(param): name for name, param in step.model.named_parameters()}
    for group in optimizer.param_groups:
        for param in group["params"]:
            name = names.get(id(param), "a parameter that the model does not have")
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor) and not is_finite(value):
                    return _state(optimizer, name, key, value)
            if _vanishes(group.get("eps"), param.dtype) and not group.get("fused"):
                return _epsilon(optimizer, name, param.dtype, group["eps"])
    return None


def explain_update(optimizer: Optimizer, name: str, param: Tensor) -> tuple[str, Remedy | None]:
    """Returns what the state of a parameter that is not finite says of the step that made it so, and a remedy."""
    state = {
        key: value
        for key, value in optimizer.state.get(param, {}).items()
        if isinstance(value, Tensor) and value.dim() and value.is_floating_point()
    }
    if not state:
        return "", None
    kind = type(optimizer).__name__
    bad = next((key for key, value in state.items() if not is_finite(value)), None)
    if bad is not None:
        return f"{kind}'s {bad} of {name} is not finite either: a gradient that was not finite was stepped on.", None
    text = f"{kind}'s {' and '.join(state)} of {name} are finite, and so were the gradients: its own step made it so."
    group = next(each for each in optimizer.param_groups if any(param is own for own in each["params"]))
    if _vanishes(group.get("eps"), param.dtype):
        found = _epsilon(optimizer, name, param.dtype, group["eps"])
        return f"{text} {found.what}", found.remedies[0]
    return text, None


def explain_step(before: Before) -> Explanation | None:
    """Returns why a step gave parameters that are not finite, or changed them too much; None where it did neither.

    The step is run once more on copies of what it began with, and with what may mend it.
    """
    kind = type(before.optimizer).__name__
    if all(each.gradient is None for each in before.params):
        return None
    for each in before.params:
        for key, value in each.state.items():
            if isinstance(value, Tensor) and not is_finite(value):
                return _state(before.optimizer, each.name, key, value)
        if each.gradient is not None and not is_finite(each.gradient):
            numbers = numbers_of(each.gradient)
            what = f"the gradient of {each.name} was not finite ({numbers}), and {kind} stepped all the same."
            return Explanation(GRADIENTS, what, OPTIMIZER, name=f"the gradient of {each.name}", operands=[numbers])
        if not is_finite(each.value):
            return None
    after = before.after()
    bad = next((number for number, each in enumerate(after) if not is_finite(each)), None)
    update = before.largest_update(after)
    again = before.run()
    same = all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(again, after, strict=True))
    limit = math.inf if bad is not None else _BETTER * update
    tried = [(each, before.largest_update(before.run(each.dtype, each.options))) for each in _tries(before)]
    helping = [(each, now) for each, now in tried if math.isfinite(now) and now < limit]
    if helping:
        found = _found(before, after, bad, update, *_best(helping))
        if not same:
            found.notes.append("run once more without what a library has put around the step, it gives other values")
        return found
    if bad is None:
        return None
    name = before.params[bad].name
    what = f"{kind}'s step made {name} {numbers_of(after[bad])}, of finite gradients and state; nothing tried mends it."
    return Explanation(
        "optimizer", what, OPTIMIZER, module=name.rpartition(".")[0], name=name, output=numbers_of(after[bad])
    )


@dataclass(frozen=True)
class Try:
    """What may have gone wrong, and the options or the dtype with which it would not have."""

    kind: str
    text: str
    ours: str
    plain: str  # in plain torch
    options: dict[str, Any]
    dtype: torch.dtype | None = None
    enough: float = math.inf  # a largest update from which on another of its kind is better


def _tries(before: Before) -> Iterator[Try]:
    """Yields the likeliest first."""
    for group, usual in zip(before.options, before.rates or [[]] * len(before.options), strict=False):
        rate = float(group.get("lr", 0.0))
        was = median(usual) if usual else 0.0
        if was and not rate <= _JUMP * was:
            text = f"its learning rate was {rate:g}, and {was:g} in the {len(usual)} steps before."
            remedy = f"lr={was:g} there, or a warm-up"
            yield Try("learning rate", text, remedy, remedy, {"lr": was})
    for number, group in enumerate(before.options):
        eps = group.get("eps")
        if not isinstance(eps, float):
            continue
        dtypes = {each.value.dtype for each in before.params if each.group == number}
        narrow = next((each for each in dtypes if _vanishes(eps, each)), None)
        text = f"eps={eps:g}"
        if narrow is not None:
            text += f" is zero in {_short(narrow)}, the dtype of the parameters"
        text += ": where the second moment is zero, or nearly, the step is divided by next to nothing."
        for value in _EPS:
            if float(value) > eps and not any(_vanishes(float(value), each) for each in dtypes):
                ours = f"eps={value}" + (f", or {_MASTER}" if narrow is not None else "")
                enough = _STEPS_OF_RATE * float(group.get("lr", math.inf))
                yield Try("optimizer's epsilon", text, ours, f"eps={value}", {"eps": float(value)}, None, enough)
    narrow = next((each.value.dtype for each in before.params if each.value.dtype in _HALVES), None)
    if narrow is not None:
        text = f"in float32 it is finite: a value within it leaves {_short(narrow)}'s range."
        ours, plain = _MASTER.replace("16", "bf16"), "parameters and state in float32, under torch.autocast"
        yield Try("overflow in the optimizer", text, ours, plain, {}, torch.float32)


def _best(helping: list[tuple[Try, float]]) -> tuple[Try, float]:
    """Returns the first kind's: what is enough with the least change, else what helps most."""
    same = [each for each in helping if each[0].kind == helping[0][0].kind]
    return next((each for each in same if each[1] <= each[0].enough), same[-1])


def _found(before: Before, after: list[Tensor], bad: int | None, update: float, tried: Try, now: float) -> Explanation:
    worst = bad if bad is not None else _farthest(before, after)
    param = before.params[worst]
    numbers = numbers_of(after[worst])
    how = f"made {param.name} {numbers}" if bad is not None else f"changed {param.name} by {update:.3g}"
    outcome = f"finite: the largest update is {now:.3g}, where it was {update:.3g}"
    return Explanation(
        tried.kind,
        f"{type(before.optimizer).__name__}'s step {how}, of gradients that are finite: {tried.text}",
        OPTIMIZER,
        module=param.name.rpartition(".")[0],
        name=param.name,
        operands=[numbers_of(param.gradient)] if param.gradient is not None else [],
        output=numbers,
        reached=f"the parameter {param.name}",
        remedies=[Remedy("code", tried.ours, tried.plain, outcome)],
    )


def _farthest(before: Before, after: list[Tensor]) -> int:
    def change(number: int) -> float:
        value, new = before.params[number].value, after[number]
        return float((new.double() - value.double()).abs().max()) if value.numel() else 0.0

    return max(range(len(after)), key=change)


def _vanishes(eps: object, dtype: torch.dtype) -> bool:
    return (
        isinstance(eps, float) and bool(eps) and dtype.is_floating_point and float(torch.tensor(eps, dtype=dtype)) == 0
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _state(optimizer: Optimizer, name: str, key: str, value: Tensor) -> Explanation:
    numbers = numbers_of(local(value))
    return Explanation(
        "optimizer state",
        f"{type(optimizer).__name__}'s {key} of {name} is not finite: {numbers}. The next step makes the parameter so.",
        OPTIMIZER,
        module=name.rpartition(".")[0],
        name=f"{key} of {name}",
        operands=[numbers],
    )


def _epsilon(optimizer: Optimizer, name: str, dtype: torch.dtype, eps: float) -> Explanation:
    what = (
        f"{type(optimizer).__name__}'s eps of {eps:g} is zero in {_short(dtype)}, the dtype of {name}: where the "
        "second moment is zero, too, the step is 0 / 0."
    )
    remedies = [Remedy("code", f"eps=1e-4, or {_MASTER}", "eps=1e-4")]
    return Explanation(
        "optimizer's epsilon", what, OPTIMIZER, module=name.rpartition(".")[0], name=name, remedies=remedies
    )
