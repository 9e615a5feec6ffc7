"""The values of one sampled step, and the line that they make."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from precision_lab.auditing.ledger import short
from precision_lab.auditing.sample import local
from precision_lab.explaining.before import Before
from precision_lab.explaining.swallowed import ENOUGH, TOO_MANY, explain_swallowed
from precision_lab.watching.shares import shares
from precision_lab.watching.values import Copies

ELEMENTS = 4_096
"""Of each tensor, evenly spread; the largest absolute value is that of all."""
_NOTED = 0.05
"""Shares from which a note says what a format would do, and how many notes there are at most."""
_NOTES = 8


class Sampled:
    """What was taken: (name, kind) with kind output, gradient (of the output) or parameter (its gradient)."""

    def __init__(self) -> None:
        self._keys: dict[tuple[str, str], torch.dtype] = {}
        self._tensors: list[Tensor] = []  # for each key the least and largest value, and some absolute values
        self._changes: list[tuple[list[str], Tensor]] = []
        self._before: list[Before] = []
        self._copies: Copies | None = None
        self._number, self._autocast = 0, dict[str, str]()
        self.swallowed: dict[str, Any] | None = None  # a finding, once the line is made

    def has(self, name: str, kind: str) -> bool:
        """Whether that was taken already."""
        return (name, kind) in self._keys

    def take(self, name: str, kind: str, tensor: Tensor) -> None:
        """Takes a sample of a tensor."""
        if (name, kind) in self._keys:
            return
        tensor = local(tensor.detach())
        if not tensor.numel() or not tensor.is_floating_point():
            return
        self._keys[name, kind] = tensor.dtype
        wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
        self._tensors.append(torch.stack(torch.aminmax(wide)))  # vector_norm takes 25 times as long on a CPU
        part = wide.reshape(-1)[:: _stride(wide)].abs()
        self._tensors.append(part if part.dtype is torch.float64 else part.float())

    def updates(self, names: list[str], counts: Tensor | None, before: Before) -> None:
        """Takes counts of updates, (unchanged, all) for each parameter, and what the step began with."""
        if counts is not None:
            self._changes.append((names, counts))
            self._before.append(before)

    def close(self, number: int, autocast: dict[str, str]) -> None:
        """Starts to copy all to the CPU."""
        self._number, self._autocast = number, autocast
        self._copies = Copies([*self._tensors, *(counts for _, counts in self._changes)])
        self._tensors = []

    @property
    def ready(self) -> bool:
        """Whether all have come."""
        return self._copies is not None and self._copies.ready

    def as_dict(self) -> dict[str, Any]:
        """Returns the line."""
        assert self._copies is not None
        tensors = self._copies.read()
        modules: dict[str, dict[str, Any]] = {}
        parameters: dict[str, dict[str, Any]] = {}
        for number, ((name, kind), dtype) in enumerate(self._keys.items()):
            amax = float(tensors[2 * number].abs().max())
            seen = {"dtype": short(dtype), "amax": _rounded(amax)}
            seen |= shares(tensors[2 * number + 1].numpy(), dtype, amax)
            if kind == "parameter":
                parameters[name] = {"gradient": seen}
            else:
                modules.setdefault(name, {})[kind] = seen
        for (names, _), counts in zip(self._changes, tensors[2 * len(self._keys) :], strict=True):
            for name, (same, all_) in zip(names, counts.tolist(), strict=True):
                if all_:
                    parameters.setdefault(name, {})["unchanged"] = round(same / all_, 4)
        self.swallowed = self._swallowed([counts.tolist() for counts in tensors[2 * len(self._keys) :]])
        return {
            "sample": self._number,
            "autocast": self._autocast,
            "modules": modules,
            "parameters": parameters,
            "notes": _notes(modules, parameters),
        }

    def _swallowed(self, counts: list[list[list[int]]]) -> dict[str, Any] | None:
        """Returns a finding where too many updates of an optimizer change nothing, and details of them were taken."""
        for (names, _), found, before in zip(self._changes, counts, self._before, strict=True):
            same, all_ = (sum(each[at] for each in found) for at in (0, 1))
            if before.params and all_ >= ENOUGH and same > TOO_MANY * all_:
                shares = {name: one / of for name, (one, of) in zip(names, found, strict=True) if of}
                try:
                    explanation = explain_swallowed(before, shares, same / all_)
                except Exception:  # an optimizer of anybody's: the loop goes on
                    continue
                if explanation is None:
                    continue
                return {
                    "finding": explanation.kind,
                    "at": self._number,
                    "share": round(same / all_, 4),
                    "text": explanation.what,
                    "explanation": explanation.as_dict(),
                }
        return None


def _stride(tensor: Tensor) -> int:
    """A step that meets all places of the last dimension, and gives at most `ELEMENTS` elements."""
    stride = -(-tensor.numel() // ELEMENTS)
    width = tensor.shape[-1] if tensor.dim() else 1
    while stride > 1 and math.gcd(stride, width) > 1:
        stride += 1
    return stride


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _notes(modules: dict[str, dict[str, Any]], parameters: dict[str, dict[str, Any]]) -> list[str]:
    """Returns what formats would do worst, as sentences."""
    found: list[tuple[float, str]] = []
    for name, kinds in modules.items():
        for kind, seen in kinds.items():
            what = f"{name or 'the model'}'s {'outputs' if kind == 'output' else 'gradients'}"
            for form, would in seen.get("as", {}).items():
                for key, verb in (("zero", "would be zero"), ("overflow", "would overflow")):
                    found.append((would.get(key, 0.0), f"under {form}, {would.get(key, 0):.0%} of {what} {verb}"))
            found.append((seen.get("not_finite", 0.0), f"{seen.get('not_finite', 0):.2%} of {what} are not finite"))
    for name, seen in parameters.items():
        share = seen.get("unchanged", 0.0)
        found.append((share, f"{share:.0%} of the updates of {name} change nothing: they are below its spacing"))
    found.sort(key=lambda each: -each[0])
    return [text for share, text in found[:_NOTES] if share > _NOTED]
