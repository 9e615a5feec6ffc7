"""Activation checkpointing: the same gradients, and the precision's contexts when forward runs again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_fsdp import FSDPStrategy


class Block(nn.Module):
    """Creates a tensor in its forward; `created` holds the dtype of each run's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.created: list[str] = []

    def forward(self, x: torch.Tensor, *, shift: float) -> torch.Tensor:
        ramp = torch.linspace(0, shift, 4)
        self.created.append(f"{ramp.dtype} {torch.is_autocast_enabled('cpu')}")
        return x + self.drop(self.up(self.norm(x)) + ramp)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, shift=1.0)
        return x


def gradients(mode: str, again: Any) -> tuple[str, dict[str, torch.Tensor], list[str], int]:
    model = Net()
    keys = list(model.state_dict())
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(activation_checkpointing=again), precision=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    torch.manual_seed(7)
    fabric.backward(model(torch.ones(3, 4)).pow(2).mean())
    fabric.precision_plugin.unscale_gradients(optimizer)
    assert list(model.state_dict()) == keys
    found = {name: param.grad.full_tensor().double() for name, param in model.named_parameters()}  # type: ignore[union-attr]
    runs = len(model.blocks[1].created)
    with torch.no_grad():
        model(torch.ones(3, 4))
    return str(fabric.precision_plugin.report), found, model.blocks[0].created, runs


@pytest.mark.parametrize(
    ("mode", "created"),
    [
        ("64-true", "torch.float64 False"),
        ("bf16-true", "torch.bfloat16 False"),
        ("bf16-mixed", "torch.float32 True"),
        ("16-mixed", "torch.float32 True"),
        ("bf16-true; blocks.0: 32-true", "torch.float32 False"),
        ("32-true", "torch.float32 False"),
    ],
)
def test_gradients_are_the_same_and_recomputed_in_the_same_precision(mode: str, created: str) -> None:
    plain = run_in_ranks(2, gradients, mode, None)
    for (_, found, dtypes, runs), (_, expected, _, _) in zip(
        run_in_ranks(2, gradients, mode, True), plain, strict=True
    ):
        assert dtypes == [created] * 3 and runs == 2  # forward, its repetition in backward, and evaluation once
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_some_blocks_by_name() -> None:
    for report, _, created, runs in run_in_ranks(2, gradients, "32-true", "blocks.0"):
        assert len(created) == 3 and runs == 1
        assert "1 blocks compute their activations again in backward" in report


class Chatty(nn.Linear):
    def forward(self, x: torch.Tensor, debug: bool = False, determinism_check: str = "") -> torch.Tensor:
        return super().forward(x) if debug and determinism_check == "mine" else x * 0


class Talk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Chatty(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, debug=True, determinism_check="mine")
        return x


def with_keywords() -> float:
    model = Talk()
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(activation_checkpointing=True))
    fabric.setup(model)
    fabric.backward(model(torch.ones(2, 4)).sum())
    return model.blocks[1].bias.grad.full_tensor().sum().item()  # type: ignore[union-attr, operator, no-any-return]


def test_a_blocks_own_keywords_are_its_own() -> None:
    assert run_in_ranks(2, with_keywords) == [8.0, 8.0]


class Cache:
    """Keys of all layers so far, as decoders hand it from block to block."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.updated: list[int] = []


class Attending(nn.Module):
    """Adds to a cache and to a list, and returns a bias that the first block makes for all."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.key, self.up = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.ones(4)) if number == 0 else None

    def forward(self, x: Any, bias: Any, *, cache: Cache, seen: list[Any], scale: float = 1.0) -> Any:
        if bias is None:
            bias = self.bias * 2
        old = cache.keys.get(self.number)
        key = self.key(x) if old is None else torch.cat((old, self.key(x)))
        if self.number not in cache.updated:
            cache.keys[self.number] = key
            cache.updated.append(self.number)
        seen.append(x)
        out = x + self.up(torch.tanh(key.sum(0) + bias * scale)) + sum(seen) / len(seen)
        return out, bias + 0, {"cache": cache, "count": len(seen)}  # FSDP2 warns of views


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Attending(number) for number in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        bias, cache, seen = None, Cache(), []  # type: ignore[var-annotated]
        for block in self.blocks:
            x, bias, extra = block(x, bias, cache=cache, seen=seen, scale=0.5)
        assert extra["count"] == 3
        return x, cache


def with_a_cache(again: Any) -> tuple[float, dict[str, torch.Tensor], list[int]]:
    model = Decoder()
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(activation_checkpointing=again))
    fabric.setup(model)
    out, cache = model(torch.linspace(-1, 1, 12).view(3, 4))
    loss = out.pow(2).mean()
    fabric.backward(loss)
    found = {name: param.grad.full_tensor() for name, param in model.named_parameters()}  # type: ignore[union-attr]
    return loss.item(), found, cache.updated


def test_blocks_that_change_what_they_are_given() -> None:
    for mine, plain in zip(run_in_ranks(2, with_a_cache, True), run_in_ranks(2, with_a_cache, None), strict=True):
        assert mine[0] == plain[0] and mine[2] == plain[2] == [0, 1, 2]
        assert all(torch.equal(mine[1][name], value) for name, value in plain[1].items())
