"""Remapping: an optimizer made before a conversion trains the parameters that the model has after it.

    before = named_params(model)
    ...                                                # a conversion that makes new parameters
    remap_parameters(optimizer, replaced_params(before, model))

Nothing here keeps an old parameter alive: each can be freed as soon as its layer is converted. But torch swaps the
contents of parameters that are tensor subclasses, or all under `torch.__future__.set_swap_module_params_on_conversion`,
and refuses that for tensors with weak references: those are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from precision_core.policy.messages import listed

ParamMap = MutableMapping[nn.Parameter, nn.Parameter]
ParamRef = Callable[[], nn.Parameter | None]


def named_params(module: nn.Module) -> dict[str, ParamRef]:
    """Returns references to all parameters by name, weak ones where torch allows; a tied one stands under each name."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    return {
        name: _held(param) if swaps or is_traceable_wrapper_subclass(param) else WeakIdRef(param)
        for name, param in module.named_parameters(remove_duplicate=False)
    }


def _held(param: nn.Parameter) -> ParamRef:
    return lambda: param


def replaced_params(before: Mapping[str, ParamRef], module: nn.Module) -> ParamMap:
    """Returns old -> new, where the parameter of that name in `module` is another object now; old ones held weakly."""
    now = dict(module.named_parameters(remove_duplicate=False))
    params: ParamMap = WeakIdKeyDictionary()
    for name, reference in before.items():
        old, new = reference(), now.get(name)
        if old is not None and new is not None and new is not old:
            params.setdefault(old, new)
    return params


def remap_parameters(optimizer: Optimizer, params: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Puts each new parameter where `optimizer` holds its old one, in place and once.

    Raises:
        ValueError: the optimizer has state for a parameter that was replaced; nothing was changed.
    """
    with_state = [
        _name(group, index)
        for group in optimizer.param_groups
        for index, param in enumerate(group["params"])
        if param in params and optimizer.state.get(param)
    ]
    if with_state:
        raise ValueError(
            f"this {type(optimizer).__name__} has state for parameters that the conversion replaced: "
            f"{listed(with_state)}; make the optimizer after setup, or convert the model first"
        )
    held = {param for group in optimizer.param_groups for param in group["params"] if param not in params}
    for group in optimizer.param_groups:
        keep = []
        for index, param in enumerate(group["params"]):
            new = params.get(param)
            if new is None or new not in held:
                keep.append((index, param if new is None else new))
            if new is not None:
                optimizer.state.pop(param, None)
                held.add(new)
        if "param_names" in group:  # an optimizer made over named_parameters() has one name for each
            group["param_names"][:] = [group["param_names"][index] for index, _ in keep]
        group["params"][:] = [param for _, param in keep]  # LBFGS, for one, holds the very list


def _name(group: Mapping[str, list[object]], index: int) -> str:
    names = group.get("param_names")
    shape = tuple(group["params"][index].shape)  # type: ignore[attr-defined]
    return str(names[index]) if names else f"number {index} of its group, of shape {shape}"
