"""Optimizer state comes back in the dtype that it was saved in, with torch's hooks, options and rules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, Optimizer

from precision_core import CheckpointError, Fabric

FABRIC = Fabric(accelerator="cpu")


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2).to(dtype)


def stepped(optimizer: Optimizer, times: int = 2) -> Optimizer:
    for _ in range(times):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn_like(param)
        optimizer.step(lambda: 0.0) if isinstance(optimizer, LBFGS) else optimizer.step()
    return optimizer


def pass_on(path: Path, saved: Optimizer, live: Optimizer, **options: Any) -> None:
    FABRIC.save(path, {"optimizer": saved})
    FABRIC.load(path, {"optimizer": live}, **options)


def tensors(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    return [(key, value) for state in optimizer.state.values() for key, value in state.items()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.ckpt"


def master_weights(dtype: torch.dtype, state_dtype: torch.dtype) -> Adam:
    """An Adam with state in a dtype of its own."""
    optimizer = Adam(net(dtype).parameters())
    for param in optimizer.param_groups[0]["params"]:
        moments = {key: torch.rand_like(param, dtype=state_dtype) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = {"step": torch.tensor(3.0), **moments, "bits": torch.tensor([1, 2], dtype=torch.uint8)}
    return optimizer


@pytest.mark.parametrize("populated", [False, True])
@pytest.mark.parametrize("param", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("state", [torch.bfloat16, torch.float32, torch.float64])
def test_values_and_dtypes_are_bit_equal(param: torch.dtype, state: torch.dtype, populated: bool, path: Path) -> None:
    saved, live = master_weights(param, state), Adam(net(param, seed=1).parameters())
    if populated:
        stepped(live)
    pass_on(path, saved, live)
    for (key, mine), (name, theirs) in zip(tensors(live), tensors(saved), strict=True):
        assert (key, type(mine), mine.dtype) == (name, Tensor, theirs.dtype) and torch.equal(mine, theirs)
    plain = Adam(net(param).parameters())  # what torch does
    plain.load_state_dict(saved.state_dict())
    assert {value.dtype for key, value in tensors(plain) if key != "step"} == {param}


def test_state_that_had_its_parameters_dtype_follows_the_parameter(path: Path) -> None:
    saved, wider = stepped(Adam(net(torch.bfloat16).parameters())), Adam(net(torch.float32).parameters())
    pass_on(path, saved, wider)
    for (key, mine), (_, theirs) in zip(tensors(wider), tensors(saved), strict=True):
        assert mine.dtype is torch.float32 and torch.equal(mine, theirs.float()), key
    stepped(wider)


def test_state_that_would_be_rounded_is_named(path: Path) -> None:
    saved, live = stepped(Adam(net(torch.float64).parameters())), Adam(net(torch.float32).parameters())
    message = r"exp_avg of parameter 0: torch\.float64 in the checkpoint, and the parameter is torch\.float32"
    with pytest.raises(CheckpointError, match=message):
        pass_on(path, saved, live)
    assert not live.state
    pass_on(path, saved, live, strict=False)
    assert {value.dtype for _, value in tensors(live)} == {torch.float32}
    stepped(live)


def test_without_a_record_of_dtypes_nothing_is_rounded(path: Path) -> None:
    saved, live = master_weights(torch.bfloat16, torch.float32), Adam(net(torch.bfloat16).parameters())
    FABRIC.save(path, {"optimizer": saved})
    content = torch.load(path, weights_only=True)
    del content["__precision__"]["param_dtypes"]
    torch.save(content, path)
    FABRIC.load(path, {"optimizer": live})
    assert torch.equal(tensors(live)[1][1], tensors(saved)[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda params: Adam(params, foreach=True),
        lambda params: AdamW(params, fused=True),
        lambda params: AdamW(params, amsgrad=True),
        lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True),
        Adagrad,
        ASGD,
        NAdam,
        lambda params: LBFGS(params, max_iter=2),
        lambda params: AdamW(params, lr=torch.tensor(0.01), capturable=False),
    ],
)
def test_torchs_optimizers_go_on_as_if_nothing_had_been(make: Any, dtype: torch.dtype, path: Path) -> None:
    model, other = net(dtype), net(dtype)
    saved, live = stepped(make(model.parameters())), make(other.parameters())
    other.load_state_dict(model.state_dict())
    pass_on(path, saved, live)
    for (key, mine), (_, theirs) in zip(tensors(live), tensors(saved), strict=True):
        assert not isinstance(mine, Tensor) or (mine.dtype is theirs.dtype and torch.equal(mine, theirs)), key
    for optimizer in (saved, live):
        torch.manual_seed(7)
        stepped(optimizer)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_options_come_back_with_new_keys_names_and_initial_rates(path: Path) -> None:
    model = net()
    saved = SGD([("weight", model.weight), ("bias", model.bias)], lr=0.5)
    saved.param_groups[0].update(initial_lr=1.0, mine=[1, 2], lr=0.25)
    live = SGD(net().parameters(), lr=9.0)
    pass_on(path, saved, live)
    group = live.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["mine"]) == (0.25, 1.0, [1, 2])
    assert group["param_names"] == ["weight", "bias"] and group["params"][0].shape == (2, 3)


def test_the_users_hooks_run_with_tensors_of_the_state(path: Path) -> None:
    saved, live = stepped(Adam(net().parameters())), Adam(net().parameters())
    seen: list[Any] = []

    def double(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(type(state["state"][0]["exp_avg"]))
        state = copy.deepcopy(state)
        state["state"][0]["exp_avg"] *= 2
        return state

    live.register_load_state_dict_pre_hook(double)
    live.register_load_state_dict_post_hook(lambda optimizer: seen.append(type(tensors(optimizer)[1][1])))
    saved.register_state_dict_post_hook(lambda optimizer, state: {**state, "extra": 3})
    pass_on(path, saved, live)
    assert seen == [Tensor, Tensor] and torch.equal(tensors(live)[1][1], 2 * tensors(saved)[1][1])
    assert torch.load(path, weights_only=True)["optimizer"]["extra"] == 3
    seen.clear()
    live.load_state_dict(saved.state_dict())  # nothing of ours stays behind
    assert len(live._optimizer_load_state_dict_pre_hooks) == 1 and seen == [Tensor, Tensor]


class Owned(SGD):
    """An optimizer with a way of its own to save and load."""

    rate = 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rate = state_dict["rate"]


def test_an_optimizer_with_its_own_way_is_asked(path: Path) -> None:
    saved, live = Owned(net().parameters(), lr=1.0), Owned(net().parameters(), lr=1.0)
    saved.rate = 4.0
    pass_on(path, saved, live)
    assert live.rate == 4.0


@pytest.mark.parametrize("populated", [False, True])
def test_the_step_count_stays_exact_under_narrower_parameters(populated: bool, path: Path) -> None:
    """Of float32's 257 bfloat16 makes 256, where moments follow their parameter's dtype."""
    saved, live = stepped(Adam(net().parameters())), Adam(net(torch.bfloat16, seed=1).parameters())
    for state in saved.state.values():
        state["step"].fill_(257.0)
    if populated:
        stepped(live)
    FABRIC.save(path, {"model": net(), "optimizer": saved})
    FABRIC.load(path, {"model": net(torch.bfloat16), "optimizer": live}, strict=False)
    for key, value in tensors(live):
        assert value.dtype is (torch.float32 if key == "step" else torch.bfloat16)
        assert key != "step" or value.item() == 257.0
