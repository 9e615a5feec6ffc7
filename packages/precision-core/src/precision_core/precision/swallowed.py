"""Swallowed updates: how many steps of half parameters are rounded to nothing, in a sample of some thousand elements.

An update below half the spacing of its parameter leaves it as it is, however often it comes. Nothing else shows that:
the loss goes down more slowly, and stops. About every hundredth step, up to 128 elements of up to 32 parameters, others
each time, are compared before and after the step; elements without a gradient do not count.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from precision_core.policy.messages import listed

_PARAMETERS, _ELEMENTS = 32, 128
_TOO_MANY = 0.2
_ENOUGH = 256
"""Elements that were sampled, before anybody is warned."""


class Swallowed:
    """Samples the steps of parameters of `dtype`, and warns once where too many of them change nothing."""

    def __init__(self, dtype: torch.dtype, mode: str, name_of: Callable[[Tensor], str]) -> None:
        self._dtype = dtype
        self._mode = mode
        self._name_of = name_of
        self._samples = 0
        self._counts: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> (unchanged, of so many), as a tensor
        self._said = False

    @property
    def share(self) -> float | None:
        """The share of the sampled updates that changed nothing; None: nothing was sampled yet. Waits for a device."""
        counts = self._read()
        seen = sum(total for _, _, total in counts)
        return sum(unchanged for _, unchanged, _ in counts) / seen if seen else None

    @contextmanager
    def sampling(self, optimizer: Optimizer) -> Iterator[None]:
        """Context around a step of `optimizer` that is sampled."""
        if self._counts and not self._said and not self._is_on_cpu():  # the last sample has arrived long since
            self._warn()
        before = list(self._sample(optimizer))
        yield
        for param, part, old, has_gradient in before:
            unchanged = (part == old).logical_and_(has_gradient)
            self._counts[param] = torch.stack([unchanged.sum(), has_gradient.sum()])
        if before and not self._said and self._is_on_cpu():
            self._warn()

    def _sample(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Tensor, Tensor, Tensor]]:
        params = [
            param
            for group in optimizer.param_groups
            if not _is_zero(group.get("lr"))
            for param in group["params"]
            if param.dtype is self._dtype and param.grad is not None and param.grad.layout is torch.strided
        ]
        start = self._samples * _PARAMETERS % max(len(params), 1)
        self._samples += 1
        for param in (params[start:] + params[:start])[:_PARAMETERS]:
            value, gradient = _local(param.detach()), _local(param.grad)
            if not value.numel() or not (value.is_contiguous() and gradient.is_contiguous()):
                continue
            stride = max(value.numel() // _ELEMENTS, 1)
            here = slice(self._samples % stride, None, stride)
            part = value.view(-1)[here][:_ELEMENTS]
            yield param, part, part.clone(), gradient.view(-1)[here][:_ELEMENTS] != 0

    def _is_on_cpu(self) -> bool:
        return all(count.is_cpu for count in self._counts.values())

    def _read(self) -> list[tuple[Tensor, int, int]]:
        params = list(self._counts)
        numbers = torch.stack([self._counts[param] for param in params]).tolist() if params else []
        return [(param, *each) for param, each in zip(params, numbers, strict=True)]

    def _warn(self) -> None:
        counts = [each for each in self._read() if each[2]]
        seen, swallowed = sum(total for _, _, total in counts), sum(unchanged for _, unchanged, _ in counts)
        if seen < _ENOUGH or swallowed <= _TOO_MANY * seen or _is_other_rank():
            return
        self._said = True
        worst = sorted(counts, key=lambda each: each[1] / each[2], reverse=True)[:3]
        names = listed(f"{self._name_of(param)} ({unchanged / total:.0%})" for param, unchanged, total in worst)
        warnings.warn(
            f"{self._mode}: {swallowed / seen:.0%} of the updates in a sample changed nothing, being smaller than half "
            f'the spacing of their parameters, most in {names}. Use precision="bf16-master", which steps exact float32 '
            'values, or "bf16-stochastic", which rounds up or down by chance; precision.swallowed_updates is the share',
            stacklevel=7,
        )


def _is_zero(rate: object) -> bool:
    if isinstance(rate, Tensor) and not rate.is_cpu:
        return False
    return rate is not None and float(rate) == 0.0  # type: ignore[arg-type]


def _local(tensor: Tensor | None) -> Tensor:
    value: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[union-attr,assignment]
    return value


def _is_other_rank() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
