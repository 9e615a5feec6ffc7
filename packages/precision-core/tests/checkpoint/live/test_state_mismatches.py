"""State that does not match: every difference is named before anything is changed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from precision_core import CheckpointError
from precision_core.checkpoint.live.compare import check_matches
from precision_core.checkpoint.live.restore import restore
from precision_core.checkpoint.live.state import collect


def net(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    pairs = zip(sizes or (2, 3), sizes[1:] or (3,), strict=False)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairs))


def load(tree: dict[str, Any], content: dict[str, Any], strict: bool = True) -> dict[str, Any]:
    check_matches(tree, content, strict=strict)
    return restore(tree, content, strict=strict)


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def weights(change: Callable[[OrderedDict[str, Tensor]], Any]) -> dict[str, Any]:
    state = net(2, 3, 1).state_dict()
    change(state)
    return {"model": state}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"model: missing in the checkpoint, which has \['first', 'step'\]"),
        ({"model": 3}, "model: int in the checkpoint, expected Sequential's state"),
        (weights(lambda state: state.pop("1.bias")), r"model\.1\.bias: missing in the checkpoint"),
        (weights(lambda state: state.update(x=torch.ones(1))), r"model\.x: unexpected in the checkpoint"),
        (
            weights(lambda state: state.update({"1.weight": torch.ones(3, 3)})),
            r"model\.1\.weight: shape \(3, 3\) in the checkpoint, \(1, 3\) in the model",
        ),
        (
            weights(lambda state: state.update({"1.bias": 3})),
            r"model\.1\.bias: int in the checkpoint, expected a tensor",
        ),
        (
            weights(lambda state: state.update({"1.bias": torch.ones(1, dtype=torch.float64)})),
            r"model\.1\.bias: torch.float64 in the checkpoint, torch.float32 in the model; strict=False rounds",
        ),
        (weights(lambda state: state.update({"1.bias": torch.ones(1).long()})), r"torch.int64 in the checkpoint"),
    ],
)
def test_a_module_that_does_not_fit_changes_nothing(content: dict[str, Any], message: str) -> None:
    model = net(2, 3, 1, seed=1)
    tree = {"first": net(seed=1), "model": model, "step": 1}
    content = {"first": net().state_dict(), "step": 2, **content}
    with pytest.raises(CheckpointError, match=message):
        load(tree, content)
    assert equal(model, net(2, 3, 1, seed=1)) and equal(tree["first"], net(seed=1)) and tree["step"] == 1


def test_all_problems_are_named_ten_at_most() -> None:
    with pytest.raises(CheckpointError) as error:
        load({"m": net(*[2] * 8)}, {"m": {}})
    lines = str(error.value).splitlines()
    assert (
        len(lines) == 12
        and lines[10] == "  m.4.bias: missing in the checkpoint"
        and lines[11] == "  ... and 4 more [checkpoint-mismatch]"
    )


@pytest.mark.parametrize(
    ("saved", "live", "loses"),
    [
        (torch.float32, torch.float64, False),
        (torch.bfloat16, torch.float32, False),
        (torch.float16, torch.float32, False),
        (torch.complex64, torch.complex128, False),
        (torch.float16, torch.bfloat16, True),
        (torch.bfloat16, torch.float16, True),
        (torch.float32, torch.bfloat16, True),
        (torch.complex128, torch.complex64, True),
        (torch.complex64, torch.float32, True),
        (torch.int64, torch.int32, True),
    ],
)
def test_dtypes_that_would_lose_values_need_strict_false(saved: torch.dtype, live: torch.dtype, loses: bool) -> None:
    def buffer(dtype: torch.dtype) -> nn.Module:
        module = nn.Module()
        module.register_buffer("b", torch.tensor([3], dtype=dtype))
        return module

    tree, content = {"m": buffer(live)}, collect({"m": buffer(saved)})
    tree["m"].b.zero_()  # type: ignore[union-attr, operator]
    if loses:
        with pytest.raises(CheckpointError, match=str(saved)):
            load(tree, content)
        assert tree["m"].b.item() == 0  # type: ignore[union-attr, operator]
    if not (saved.is_complex and not live.is_complex):
        load(tree, content, strict=not loses)
        assert tree["m"].b.item() == 3 and tree["m"].b.dtype is live  # type: ignore[union-attr, operator]


def split(model: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": [model[0].weight]}, {"params": [model[0].bias]}]


@pytest.mark.parametrize(
    ("saved", "live", "message"),
    [
        (
            lambda m: Adam(m.parameters()),
            lambda m: Adam(split(m)),
            r"groups of \[2\] parameters .* \[1, 1\] in the opt",
        ),
        (lambda m: SGD(m.parameters()), lambda m: Adam(m.parameters()), "so another optimizer than Adam wrote it"),
        (
            lambda m: Adam(m.parameters()),
            lambda m: Adam(reversed(list(m.parameters()))),
            r"exp_avg of parameter 0 has shape \(3, 2\) in the checkpoint, \(3,\) in the optimizer",
        ),
        (lambda m: m, lambda m: Adam(m.parameters()), "not the state of an optimizer in the checkpoint"),
    ],
)
def test_an_optimizer_that_does_not_fit_changes_nothing(saved: Any, live: Any, message: str) -> None:
    first, second = net(), net(seed=1)
    given = saved(first)
    content = collect({"model": first, "optimizer": given if given is first else stepped(given)})
    optimizer = stepped(live(second))
    before = copy.deepcopy((second.state_dict(), optimizer.state_dict()))
    with pytest.raises(CheckpointError, match=message):
        load({"model": second, "optimizer": optimizer}, content)
    assert str((second.state_dict(), optimizer.state_dict())) == str(before)


def test_options_of_another_torch_version_or_of_a_scheduler_are_no_other_optimizer() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    older = collect({"o": optimizer})
    del older["o"]["param_groups"][0]["fused"]
    newer = collect({"o": optimizer})
    newer["o"]["param_groups"][0]["new_option"] = True
    OneCycleLR(scheduled := AdamW(model.parameters()), 0.5, total_steps=3)
    for content in (older, newer, collect({"o": scheduled})):
        load({"o": AdamW(model.parameters())}, content)
