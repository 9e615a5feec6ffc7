"""Subclasses of `nn.Linear` whose forward gives the same, Falcon's for example: they are quantised, too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

_OWN = ("forward", "__init__", "extra_repr", "reset_parameters", "weight", "bias")
_CALLS = ("__call__", "__getattr__", "__getattribute__", "__setattr__")
_ROWS, _COLUMNS = 3, 4


def linear_kinds(module: nn.Module, known: tuple[type[nn.Module], ...]) -> set[type[nn.Module]]:
    """Returns the subclasses of `nn.Linear` that a model's layers have but for `known` and what derives from it.

    A parametrised layer has a class of its own, derived from the one it had; that one counts.
    """
    kinds = {
        type(child).__bases__[0] if parametrize.is_parametrized(child) else type(child)
        for child in module.modules()
        if isinstance(child, nn.Linear) and not isinstance(child, known)
    }
    return kinds - {nn.Linear}


def differs_from_linear(layer: nn.Module) -> str | None:
    """Returns in what a layer of a subclass differs from `nn.Linear`, None: in nothing.

    It has nothing of its own but a forward, and that gives x W^T + bias for small values in its weight's place.
    """
    kind = type(layer)
    about = f"a subclass of Linear: {kind.__name__}"
    own = sorted({name for each in kind.__mro__[: kind.__mro__.index(nn.Linear)] for name in vars(each) if _adds(name)})
    if own:
        return f"{about}, which has {', '.join(own)} of its own"
    state = [*layer._parameters, *layer._buffers, *layer._modules]
    more = [name for name in state if name not in ("weight", "bias")]
    if more:
        return f"{about}, which holds {', '.join(more)} as well"
    try:
        same = _computes_a_product(layer)
    except Exception as error:  # of code that is not ours
        return f"{about}, whose forward could not be tried: {type(error).__name__}: {error}"
    return None if same else f"{about}, which computes something else than x W^T + bias"


def _adds(name: str) -> bool:
    return name in _CALLS or (name not in _OWN and not name.startswith("__"))


def _computes_a_product(layer: Any) -> bool:
    kind, device = type(layer), torch.device("cpu")
    probe: Any = object.__new__(kind)
    nn.Module.__init__(probe)
    vars(probe).update({name: value for name, value in vars(layer).items() if name not in vars(probe)})
    probe.in_features, probe.out_features = _COLUMNS, _ROWS
    weight = torch.arange(1.0, 1 + _ROWS * _COLUMNS, device=device).sin().view(_ROWS, _COLUMNS)
    bias = None if layer._parameters.get("bias") is None else torch.arange(1.0, 1 + _ROWS, device=device).cos()
    probe.weight = nn.Parameter(weight)
    probe.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    x = torch.arange(1.0, 1 + 10 * _COLUMNS, device=device).mul(0.7).cos().view(2, 5, _COLUMNS)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        for given in (x, x[0], x[0, 0]):
            for training in (True, False):
                result, expected = probe.train(training)(given), F.linear(given, weight, bias)
                if not (isinstance(result, Tensor) and result.shape == expected.shape):
                    return False
                if result.dtype is not expected.dtype or not torch.allclose(result, expected, rtol=1e-5, atol=1e-6):
                    return False
    return True
