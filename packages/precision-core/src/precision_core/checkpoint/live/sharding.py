"""Which tensors of live objects are sharded, and how."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from precision_core.checkpoint.live.optimizer_state import indexed_params
from precision_core.checkpoint.live.state import state_of, stateful_objects
from precision_core.checkpoint.tensors import is_sharded
from precision_core.checkpoint.tree import Path, leads_to, look_up, paths
from precision_core.data.loader import DeviceLoader


def shardings(tree: dict[str, Any], content: dict[str, Any]) -> dict[Path, Tensor]:
    """Returns the live DTensor whose sharding each tensor in `content` takes, by its path; others are needed whole.

    State that an optimizer does not have yet takes its parameter's.
    """
    found: dict[Path, Tensor] = {}
    for path, live in stateful_objects(tree):
        if isinstance(live, DeviceLoader) or not leads_to(path, content):
            continue
        saved = dict(paths(look_up(content, path), lambda tensor: True))
        sharded = dict(paths(state_of(live), is_sharded))
        if isinstance(live, Optimizer) and any(is_sharded(p) for group in live.param_groups for p in group["params"]):
            params = dict(indexed_params(live, look_up(content, path)))
            of_params = {place: params.get(place[1]) for place in saved if place[0] == "state"}
            sharded = {
                **{p: param for p, param in of_params.items() if param is not None and is_sharded(param)},
                **sharded,
            }
        for place, tensor in saved.items():
            if place in sharded and sharded[place].shape == tensor.shape:
                found[(*path, *place)] = sharded[place]
    return found
