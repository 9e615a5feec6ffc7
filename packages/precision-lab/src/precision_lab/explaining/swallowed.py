"""Updates that round to nothing: how much of the way is lost, and how much with exact values or rounding by chance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from precision_lab.explaining.before import Before
from precision_lab.explaining.explanation import Explanation, Remedy
from precision_lab.explaining.numbers import numbers_of, percent, words

KIND = "swallowed updates"
TOO_MANY = 0.2
"""Share of sampled updates that change nothing, from which on that is told."""
ENOUGH = 256
"""Sampled updates, below which nothing is told."""
_LITTLE = 0.1
"""Of the way."""
STEPS = 64
"""Of the optimizer, with the gradient of the sampled step, by which remedies are tried."""
_ELEMENTWISE = words("SGD Adam AdamW Adamax NAdam RAdam RMSprop Adagrad Adadelta ASGD Rprop")
"""Optimizers of torch.optim whose step of some elements does not depend on the others."""


def explain_swallowed(before: Before, unchanged: dict[str, float], share: float) -> Explanation | None:
    """Returns the explanation for a step of which `share` of the sampled updates changed nothing.

    None where next to nothing is lost by it: few elements had far to go, or it was rounded by chance.

    Args:
        before: what the step began with, of the sampled elements alone.
        unchanged: the share of each parameter.
        share: of all.
    """
    lost = _lost(before)
    if lost is not None and (lost["as it is"] < _LITTLE or not _is_bare(before)):
        return None
    worst = sorted(unchanged, key=lambda name: -unchanged[name])
    param = next((each for each in before.params if each.name == worst[0]), before.params[0])
    dtype = str(param.value.dtype).removeprefix("torch.")
    most = ", ".join(f"{name} ({percent(unchanged[name])})" for name in worst[:3])
    found = Explanation(
        KIND,
        f"{percent(share)} of the sampled updates change nothing: they are below half the spacing of {dtype} "
        f"parameters, most in {most}.",
        "optimizer",
        module=param.name.rpartition(".")[0],
        name=param.name,
        operands=[numbers_of(param.value)],
    )
    if lost is None:
        found.notes.append(
            f"not tried: a step of {type(before.optimizer).__name__} takes more than the sampled elements"
        )
    else:
        found.what += f" Of {STEPS} such steps, {percent(lost['as it is'])} of the way is lost."
    prefix = "bf16" if dtype == "bfloat16" else "16"
    master = "float32 parameters under torch.autocast, or an optimizer that keeps float32 copies of them"
    chance = "an optimizer that rounds bfloat16 stochastically"
    for mode, plain in (("master", master), ("stochastic", chance)):
        if mode == "master" or prefix == "bf16":
            found.remedies.append(Remedy("mode", f'precision="{prefix}-{mode}"', plain, _outcome(lost, mode)))
    return found


def _outcome(lost: dict[str, float] | None, mode: str) -> str:
    if lost is None:
        return "not tried"
    was, now = lost["as it is"], lost[mode]
    word = "better" if now < was / 2 else "no better"
    return f"{word}: of {STEPS} such steps {percent(now)} of the way is lost, where it was {percent(was)}"


def _lost(before: Before) -> dict[str, float] | None:
    """Returns the share of the way in float32 that is lost, by how parameters are stored; None: it cannot be tried."""
    kind = type(before.optimizer)
    if kind.__name__ not in _ELEMENTWISE or not kind.__module__.startswith("torch.optim"):
        return None
    exact = _way(before, torch.float32, None)
    length = sum(float(each.abs().sum()) for each in exact)
    if not length:
        return None

    def lost(way: list[Tensor]) -> float:
        gone = sum(float((one * other.sign()).sum()) for one, other in zip(way, exact, strict=True))
        return min(max(1 - gone / length, 0.0), 1.0)

    generator = torch.Generator().manual_seed(0)
    return {
        "as it is": lost(_way(before, None, None)),
        "master": lost(exact),
        "stochastic": lost(_way(before, torch.float32, lambda value: _by_chance(value, generator))),
    }


def _is_bare(before: Before) -> bool:
    """Whether the step was the optimizer's own, and not one around which something rounds otherwise."""
    pairs = list(zip(before.run(), before.after(), strict=True))
    other = sum(int((one != two).sum()) for one, two in pairs)
    return other <= 0.01 * sum(one.numel() for one, _ in pairs)


def _way(before: Before, dtype: torch.dtype | None, store: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
    twin = before.twin(dtype)
    for _ in range(STEPS):
        twin.step()
        for param in twin.params if store is not None else ():
            param.data.copy_(store(param.data))  # type: ignore[misc]  # mypy does not see the loop's condition
    return [new.detach().double() - old.value.double() for new, old in zip(twin.params, before.params, strict=True)]


def _by_chance(value: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds float32 values to bfloat16 ones, up or down with the probability of what is cut off."""
    noise = torch.randint(1 << 16, value.shape, generator=generator, dtype=torch.int32)
    bits = value.view(torch.int32) + noise.to(value.device)
    return bits.bitwise_and(-(1 << 16)).view(torch.float32)
