"""Hooks that move: each kind runs on the new module, and the handles still remove them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from precision_core.surgery.hooks import move_hooks

Log = list[Any]


def double(*args: Any) -> None:
    """A hook that pickles."""


# the kind -> what registers a hook of it that writes to the log
REGISTER: dict[str, Callable[[nn.Module, Log], RemovableHandle]] = {
    "forward": lambda m, log: m.register_forward_hook(lambda mod, args, out: log.append(mod)),
    "forward-kwargs": lambda m, log: m.register_forward_hook(
        lambda mod, args, kwargs, out: log.append(mod), with_kwargs=True
    ),
    "forward-pre": lambda m, log: m.register_forward_pre_hook(lambda mod, args: log.append(mod)),
    "forward-pre-kwargs": lambda m, log: m.register_forward_pre_hook(
        lambda mod, args, kwargs: log.append(mod), with_kwargs=True
    ),
    "full-backward": lambda m, log: m.register_full_backward_hook(lambda mod, inp, out: log.append(mod)),
    "backward-pre": lambda m, log: m.register_full_backward_pre_hook(lambda mod, out: log.append(mod)),
    "backward": lambda m, log: m.register_backward_hook(lambda mod, inp, out: log.append(mod)),
    "state-dict": lambda m, log: m.register_state_dict_post_hook(lambda mod, *_: log.append(mod)),
    "state-dict-pre": lambda m, log: m.register_state_dict_pre_hook(lambda mod, *_: log.append(mod)),
    "load-pre": lambda m, log: m.register_load_state_dict_pre_hook(lambda mod, *_: log.append(mod)),
    "load-post": lambda m, log: m.register_load_state_dict_post_hook(lambda mod, *_: log.append(mod)),
}


def use(module: nn.Module) -> None:
    module(torch.ones(1, 2, requires_grad=True)).sum().backward()
    module.load_state_dict(module.state_dict())


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("kind", REGISTER)
def test_runs_with_the_new_module_until_its_handle_removes_it(kind: str) -> None:
    old, new, log, ours = nn.Linear(2, 2), nn.Linear(2, 2), Log(), Log()
    REGISTER[kind](new, ours)
    handle = REGISTER[kind](old, log)
    move_hooks(old, new)
    use(old)
    assert log == ours == []
    use(new)
    assert log == ours == [new]
    handle.remove()
    use(new)
    assert log == [new] and ours == [new, new]


def test_private_hooks_that_know_no_module() -> None:
    old, new, log = nn.Linear(2, 2), nn.Linear(2, 2), Log()
    old._register_load_state_dict_pre_hook(lambda *_: log.append("load"))
    old._register_state_dict_hook(lambda *_: log.append("save"))
    move_hooks(old, new)
    use(new)
    assert log == ["save", "load"]


def test_always_called_stays_so() -> None:
    class Fails(nn.Module):
        def forward(self, x: Any) -> Any:
            raise KeyError

    old, new, log = nn.Linear(2, 2), Fails(), Log()
    handle = old.register_forward_hook(lambda *_: log.append("ran"), always_call=True)
    move_hooks(old, new)
    for expected in (["ran"], ["ran"]):
        with pytest.raises(KeyError):
            new(1)
        assert log == expected
        handle.remove()
    assert not new._forward_hooks_always_called


def test_the_new_ones_own_hooks_run_first_and_results_are_passed_on() -> None:
    old, new = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    old.register_forward_hook(lambda mod, args, out: out + 1)
    old.register_forward_hook(lambda mod, args, out: out * 3)
    old.register_forward_hook(lambda mod, args, out: out - 1, prepend=True)
    new.register_forward_hook(lambda mod, args, out: out * 10)
    move_hooks(old, new)
    x = torch.ones(1, 2)
    assert torch.equal(new(x), (x @ new.weight.T * 10 - 1 + 1) * 3)


def test_a_copy_and_a_pickle_have_the_hooks() -> None:
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    handle = old.register_load_state_dict_pre_hook(double)
    move_hooks(old, new)
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        (hook,) = twin._load_state_dict_pre_hooks.values()
        assert hook.module() is twin
    handle.remove()
    assert not new._load_state_dict_pre_hooks


def test_full_and_not_full_backward_hooks_do_not_mix() -> None:
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    old.register_full_backward_hook(double)
    old.register_forward_hook(double)
    handle = new.register_backward_hook(double)
    with pytest.raises(ValueError, match="full and non-full"):
        move_hooks(old, new)
    assert len(old._forward_hooks) == 1 and not new._forward_hooks
    handle.remove()
    move_hooks(old, new)
    assert new._is_full_backward_hook is True
