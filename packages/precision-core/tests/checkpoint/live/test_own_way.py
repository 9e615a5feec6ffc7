"""Who loads its own way, and which names of a module that concerns."""

from __future__ import annotations

import types
from typing import Any

import pytest
from torch import nn
from torch.optim import LBFGS, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from precision_core.checkpoint.live.own_way import judges_for_itself, loads_its_own_way, overrides, own_prefixes


class Renaming(nn.Linear):
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)


class Extra(nn.Linear):
    def set_extra_state(self, state: Any) -> None: ...


class Root(nn.Sequential):
    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        return super().load_state_dict(*args, **options)


def hooked(kind: str) -> nn.Module:
    module = nn.Linear(2, 2)
    getattr(module, f"register_load_state_dict_{kind}_hook")(lambda *args: None)
    return module


def patched(module: nn.Module, method: str) -> nn.Module:
    setattr(module, method, types.MethodType(getattr(type(module), method), module))
    return module


@pytest.mark.parametrize(
    ("layer", "judges", "own"),
    [
        (nn.BatchNorm1d(2), False, False),
        (nn.LazyLinear(2), False, False),
        (Renaming(2, 2), True, True),
        (patched(nn.Linear(2, 2), "_load_from_state_dict"), True, True),
        (Extra(2, 2), False, True),
        (hooked("pre"), True, True),
        (hooked("post"), False, True),
    ],
    ids=lambda each: type(each).__name__,
)
def test_layers(layer: nn.Module, judges: bool, own: bool) -> None:
    assert (judges_for_itself(layer), loads_its_own_way(layer)) == (judges, own)
    inside = nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer))
    assert own_prefixes(inside, loads_its_own_way) == (("1.0.",) if own else ())
    compiled = nn.ModuleDict({"_orig_mod": inside})  # the name that torch.compile gives
    assert own_prefixes(compiled, judges_for_itself) == (("1.0.",) if judges else ())


def test_a_roots_load_state_dict_concerns_all_names_and_a_layers_none() -> None:
    assert own_prefixes(Root(), loads_its_own_way) == ("",)
    assert own_prefixes(patched(nn.Linear(2, 2), "load_state_dict"), loads_its_own_way) == ("",)
    assert own_prefixes(nn.Sequential(Root()), loads_its_own_way) == ()


class Sharding(AdamW):
    """As torch's ZeroRedundancyOptimizer, which lies elsewhere than its base classes."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    load_state_dict.__module__ = "torch.distributed.optim.zero_redundancy_optimizer"


def hooked_optimizer() -> Optimizer:
    optimizer = AdamW(nn.Linear(1, 1).parameters())
    optimizer.register_load_state_dict_post_hook(lambda optimizer: None)
    return optimizer


def test_optimizers_and_others() -> None:
    params = list(nn.Linear(1, 1).parameters())
    assert not any(map(loads_its_own_way, (AdamW(params), LBFGS(params))))
    assert loads_its_own_way(hooked_optimizer()) and not overrides(hooked_optimizer(), "load_state_dict")
    assert overrides(Sharding(params), "load_state_dict")
    assert loads_its_own_way(StepLR(AdamW(params), 1))
