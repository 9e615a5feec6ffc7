"""Training curves on two and three ranks are those of one device with the same global batch, and no others."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from precision_core import MODES, Fabric, MixedPrecision
from precision_core.testing import curve_distance, loss_bound, run_in_ranks, train
from precision_core.testing.controls import LEFT_SCALED, LOWER
from precision_core.testing.problem import adamw, mean_curve
from precision_fsdp import FSDPStrategy

STEPS = 100


@cache
def alone(mode: str, optimizer: str = "sgd") -> list[float]:
    return train(Fabric(accelerator="cpu", precision=mode), steps=STEPS, **_options(optimizer))


def _options(optimizer: str) -> dict[str, Any]:
    return {"optimizer": adamw} if optimizer == "adamw" else {}


def sharded(precision: Any, optimizer: str = "sgd") -> list[float]:
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(wrap="Block"), precision=precision)
    return train(fabric, steps=STEPS, **_options(optimizer))


@cache
def on_ranks(mode: str, ranks: int) -> list[float]:
    return mean_curve(run_in_ranks(ranks, sharded, mode))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_curves_are_those_of_one_device(mode: str, ranks: int) -> None:
    assert curve_distance(on_ranks(mode, ranks), alone(mode)) <= loss_bound(mode, STEPS)


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed"])
def test_with_adamw_too(mode: str) -> None:
    curve = mean_curve(run_in_ranks(2, sharded, mode, "adamw"))
    assert curve_distance(curve, alone(mode, "adamw")) <= loss_bound(mode, STEPS)


def test_cores_autocast_over_float32_shards_too() -> None:
    curve = mean_curve(run_in_ranks(2, lambda: sharded(MixedPrecision("bf16-mixed", device="cpu"))))
    assert curve_distance(curve, alone("bf16-mixed")) <= loss_bound("bf16-mixed", STEPS)


# -------------------------------------------------------------------- controls


@pytest.mark.parametrize("mode", MODES)
def test_one_dtype_lower_is_beyond_the_bound(mode: str) -> None:
    lower = LOWER[mode]
    curve = on_ranks(lower, 2) if lower else mean_curve(run_in_ranks(2, rounding, mode))
    assert curve_distance(curve, alone(mode)) > loss_bound(mode, STEPS)


def rounding(mode: str) -> list[float]:
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(wrap="Block"), precision=mode)
    return train(fabric, steps=STEPS, after_step=round_shards)


@torch.no_grad()
def round_shards(model: nn.Module) -> None:
    for param in model.parameters():
        shard = param.to_local()  # type: ignore[operator]
        shard.copy_(shard.to(torch.float8_e4m3fn).to(shard.dtype))


@pytest.mark.parametrize("factor", [2.0, LEFT_SCALED], ids=["summed", "left scaled"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_another_size_are_beyond_the_bound(mode: str, factor: float) -> None:
    curve = mean_curve(run_in_ranks(2, multiplied, mode, factor))
    assert curve_distance(curve, alone(mode)) > loss_bound(mode, STEPS)


def multiplied(mode: str, factor: float) -> list[float]:
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(wrap="Block"), precision=mode)
    return train(fabric, steps=STEPS, gradient_factor=factor)


@pytest.mark.parametrize("mode", MODES)
def test_ranks_that_do_not_reduce_are_beyond_the_bound(mode: str) -> None:
    curve = mean_curve(run_in_ranks(2, unreduced, mode))
    assert curve_distance(curve, alone(mode)) > loss_bound(mode, STEPS)


def unreduced(mode: str) -> list[float]:
    rank = int(os.environ["RANK"])
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")  # of this forked process
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(wrap="Block"), precision=mode)
    return train(fabric, steps=STEPS, rank=rank, world_size=2)
