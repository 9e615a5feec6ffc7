"""Exceptions: which modules to leave in float32 when a format does not do for all, and the reason for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from precision_core import Policy
from precision_core.policy import dtype_name
from precision_core.support import is_core_mode
from precision_lab.sensitivity import Layer
from precision_lab.updates import TOO_MANY

Trouble = Literal["not finite", "swallowed", "worse"]
"""What became of a mode: losses or gradients that are inf or NaN, updates that round to nothing, a worse loss."""

MOST = 0.8
"""Share of the rounding error that the modules of an exception have to hold together..."""
FEW = 0.3
"""...with this share of the parameters at most: else the format does not do for the model."""
NEAR = 16.0
"""Training moves values: a module within this factor of the format's end is tried, where none is beyond it."""

Exceptions = dict[str, str]
"""Pattern of a module -> why it stays in float32."""


def propose(mode: str, trouble: Trouble, layers: Sequence[Layer], measured: dict[str, float]) -> list[Exceptions]:
    """Returns sets of exceptions to try under `mode`, the smallest first; none where nothing stands out.

    `measured` has the share of updates that rounded to nothing by module, where training has counted them.
    """
    if not is_core_mode(mode):  # a package's, which has ways of its own to leave modules alone
        return []
    policy = Policy.parse(mode)
    if policy.exceptions or policy.compute not in (torch.bfloat16, torch.float16):
        return []
    named = [layer for layer in layers if layer.name]
    found: list[Exceptions] = []
    if trouble == "not finite":
        beyond = beyond_range(named, policy.compute)
        found += [beyond, _parents(beyond)]
    rounds = policy.master is None and policy.rounding == "nearest"
    if trouble in ("swallowed", "worse") and not policy.mixed and rounds:
        found.append(swallowed(named, policy.params, measured))
    if trouble in ("not finite", "worse"):
        found.append(rounding(named, policy.compute))
    distinct: list[Exceptions] = []
    for each in found:
        if each and list(each) not in [list(other) for other in distinct]:
            distinct.append(each)
    return distinct


def beyond_range(layers: Iterable[Layer], dtype: torch.dtype) -> Exceptions:
    """Returns the modules whose values do not fit into the format, or, where all do, nearly not."""
    end = torch.finfo(dtype).max
    for limit in (end, end / NEAR):
        reasons = {}
        for layer in layers:
            what, value = max(
                ("activations reach", layer.outputs), ("its input reaches", layer.inputs), key=lambda pair: pair[1]
            )
            if value > limit:
                reasons[layer.name] = f"{what} {value:,.0f}, {dtype_name(dtype)} ends at {end:,.0f}"
        if reasons:
            return reasons
    return {}


def swallowed(layers: Sequence[Layer], dtype: torch.dtype, measured: dict[str, float]) -> Exceptions:
    """Returns the modules too many of whose updates are below half the spacing of their parameters."""
    reasons = {}
    for layer in layers:
        share = measured.get(layer.name, layer.unchanged.get(dtype_name(dtype), 0.0))
        if share > TOO_MANY:
            reasons[layer.name] = f"{share:.0%} of its updates are below half the spacing of {dtype_name(dtype)}"
    return _grouped(reasons, [layer.name for layer in layers if layer.unchanged])  # frozen ones may go along


def rounding(layers: Sequence[Layer], dtype: torch.dtype) -> Exceptions:
    """Returns the few modules that hold most of the rounding error, measured by what it does to the loss."""
    name = dtype_name(dtype)
    squares = {layer.name: layer.rounding.get(name, 0.0) ** 2 for layer in layers}
    total, parameters = sum(squares.values()), sum(layer.parameters for layer in layers)
    reasons: Exceptions = {}
    held = size = 0.0
    for layer in sorted(layers, key=lambda layer: -squares[layer.name]):
        if not total or held >= MOST * total:
            break
        held, size = held + squares[layer.name], size + layer.parameters
        reasons[layer.name] = (
            f"rounding it to {name} moves the loss by {layer.rounding[name]:.1e}, "
            f"{squares[layer.name] / total:.0%} of all modules' squared"
        )
    few = len(reasons) <= max(1, len(layers) // 3) and size <= FEW * max(1, parameters)
    return reasons if few else {}


def spelled(mode: str, exceptions: Exceptions) -> str:
    """Returns the policy: `mode`, and the modules in float32."""
    return str(Policy.parse("; ".join([mode, *(f"{pattern}: 32-true" for pattern in exceptions)])))


def _parents(reasons: Exceptions) -> Exceptions:
    """Returns the modules around them: what is too large may be computed between a module and the next one."""
    around: Exceptions = {}
    for name, reason in reasons.items():
        parent = name.rpartition(".")[0]
        if not parent:
            return {}  # the whole model
        around.setdefault(parent, f"{name}: {reason}")
    return {name: reason for name, reason in around.items() if not any(name.startswith(f"{o}.") for o in around)}


def _grouped(reasons: Exceptions, names: Sequence[str]) -> Exceptions:
    """Returns one pattern, `*.norm`, for all modules of a name, where there are several and all are exceptions."""
    ends: dict[str, list[str]] = {}
    for name in names:
        ends.setdefault(name.rpartition(".")[2], []).append(name)
    grouped: Exceptions = {}
    for name, reason in reasons.items():
        end = name.rpartition(".")[2]
        like = ends[end]
        if len(like) > 1 and not end.isdigit() and all(each in reasons for each in like):
            grouped.setdefault(f"*.{end}", f"in {name}, {reason}")
        else:
            grouped[name] = reason
    return grouped
