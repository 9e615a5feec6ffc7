"""A set-up model, or a copy of one, that its user casts: `copy.deepcopy(model).float()`, an average of a half model.

Under a true mode forward casts inputs to the mode's dtype, which weights of another dtype do not take. So a model that
is cast goes on in the true mode of what it was cast to, with its inputs, created tensors and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from precision_core.dtypes import FLOAT_DTYPES

_CAST = "_precision_cast"


def following_casts(dtype: torch.dtype) -> Callable[..., Callable[..., Any]]:
    """Returns what `override` takes for `_apply` of a module whose parameters are in `dtype`: it notes casts."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            was, before = cast_to(self) or dtype, [param.dtype for param in self.parameters()]
            result = function(self, *args, **kwargs)
            for old, param in zip(before, self.parameters(), strict=False):
                if old is was and param.dtype is not was and param.dtype in FLOAT_DTYPES:
                    forget_cast(self)
                    if param.dtype is not dtype:
                        self.__dict__[_CAST] = param.dtype
                    break
            return result

        return _apply

    return make


def cast_to(module: nn.Module) -> torch.dtype | None:
    """Returns what a set-up model was cast to since; None: it is in its mode's dtype."""
    return module.__dict__.get(_CAST)


def forget_cast(module: nn.Module) -> None:
    """Takes the note off, for a model that is set up anew or was cast back."""
    module.__dict__.pop(_CAST, None)
