"""Master modes under FSDP2: what is beside a weight is sharded with it, stepped as float32, saved for any ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from precision_core import Fabric
from precision_core.testing import cut_small_models, run_in_ranks
from precision_fsdp import FSDPPrecision, FSDPStrategy


def make_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))  # no size divides into 2 or 3


def setup(ranks: int, mode: str, seed: int) -> tuple[Fabric, nn.Module, Optimizer]:
    if ranks > 1:  # in a process of its own
        cut_small_models()
    precision = FSDPPrecision(mode, scaler={"init_scale": 2.0**8}) if mode == "16-master" else mode
    fabric = Fabric("cpu", devices=ranks, strategy=FSDPStrategy() if ranks > 1 else "auto", precision=precision)
    model = make_net(seed + fabric.global_rank)  # each rank draws weights of its own
    return fabric, *fabric.setup(model, AdamW(model.parameters(), lr=1e-4, foreach=True))


def step(fabric: Fabric, model: nn.Module, optimizer: Optimizer, seed: int) -> float:
    """Runs all but the step itself; returns by what the gradients are still to be multiplied."""
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    for micro in range(2):
        with fabric.no_backward_sync(model, enabled=micro == 0):
            fabric.backward(model(torch.randn(4, 5, generator=generator)).pow(2).mean())
    norm = fabric.clip_gradients(model, optimizer, max_norm=0.1)
    is_half = fabric.precision_plugin.policy.scale  # those stay as they are until the step
    return (0.1 / (norm + 1e-6)).clamp(max=1.0) / fabric.precision_plugin.scale if is_half else 1.0  # type: ignore[operator,return-value]


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def values(fabric: Fabric, model: nn.Module) -> list[Tensor]:
    return [full(fabric.precision_plugin.masters.value(param)) for param in model.parameters()]


STATE = {"bf16-master": {"master_rest": torch.int16}, "16-master": {"master_weight": torch.float32}}


def steps_as_float32_does(mode: str, path: Path) -> list[Tensor]:
    fabric, model, optimizer = setup(2, mode, 0)
    start = [param.detach().clone() for param in make_net(0).parameters()]
    assert all(map(torch.equal, values(fabric, model), start))  # rank zero's bits, with its weights
    shards = [fabric.precision_plugin.masters.value(param).to_local() for param in model.parameters()]  # type: ignore[attr-defined]
    reference = [nn.Parameter(shard.clone()) for shard in shards]
    plain = AdamW(reference, lr=1e-4, foreach=True)
    for number in range(3):
        factor = step(fabric, model, optimizer, number)
        for param, mine in zip(reference, model.parameters(), strict=True):
            param.grad = mine.grad.to_local().float() * factor  # type: ignore[union-attr]
        optimizer.step()
        plain.step()
        exact = [fabric.precision_plugin.masters.value(param).to_local() for param in model.parameters()]  # type: ignore[attr-defined]
        assert all(map(torch.equal, exact, reference))
        state = optimizer.state[next(model.parameters())]
        assert {key: each.dtype for key, each in state.items()} == {
            "step": torch.float32,
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
            **STATE[mode],
        }
        assert not fabric.last_step_skipped
    fabric.save(path, {"model": model, "optimizer": optimizer})
    return values(fabric, model)


def set_gradients(fabric: Fabric, model: nn.Module) -> None:
    """Gives each parameter, sharded or not, the same gradient, scaled where the mode scales."""
    loss = torch.zeros((), requires_grad=True)
    fabric.backward(loss)
    for param in model.parameters():
        gradient = torch.arange(param.numel()).reshape(param.shape) / 8 * fabric.precision_plugin.scale
        gradient = gradient.to(param.dtype)
        if isinstance(param, DTensor):
            gradient = distribute_tensor(gradient, param.device_mesh, param.placements)
        param.grad = gradient
    fabric.precision_plugin.scaler.after_backward()


def loaded(ranks: int, mode: str, path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the values right after loading, and after one more step."""
    fabric, model, optimizer = setup(ranks, mode, 10)
    fabric.load(path, {"model": model, "optimizer": optimizer})
    first = [each.clone() for each in values(fabric, model)]
    set_gradients(fabric, model)
    optimizer.step()
    return first, values(fabric, model)


MODES = ("bf16-master", "16-master")


@pytest.mark.parametrize("mode", MODES)
def test_shards_step_as_float32_does_and_resume_on_any_number_of_ranks(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "last"
    saved = run_in_ranks(2, steps_as_float32_does, mode, path)[0]
    runs = {
        (1, mode): loaded(1, mode, path),
        (1, "32-true"): loaded(1, "32-true", path),
        **{(ranks, mode): run_in_ranks(ranks, loaded, ranks, mode, path)[0] for ranks in (2, 3)},
    }
    for first, then in runs.values():
        assert all(map(torch.equal, first, saved))
        assert all(map(torch.equal, then, runs[1, "32-true"][1]))


@pytest.mark.full
@pytest.mark.parametrize(("mode", "other"), [MODES, MODES[::-1]])
def test_the_other_master_mode_keeps_the_bits_in_shards(mode: str, other: str, tmp_path: Path) -> None:
    path = tmp_path / "last"
    saved = run_in_ranks(2, steps_as_float32_does, mode, path)[0]
    for ranks in (2, 3):
        first, _ = run_in_ranks(ranks, loaded, ranks, other, path)[0]
        assert all(map(torch.equal, first, saved))


def from_float32(mode: str, path: Path) -> list[Tensor]:
    fabric, model, optimizer = setup(2, mode, 10)
    fabric.load(path, {"model": model, "optimizer": optimizer})
    return values(fabric, model)


@pytest.mark.parametrize("mode", MODES)
def test_a_float32_checkpoint_keeps_its_bits_in_shards(mode: str, tmp_path: Path) -> None:
    fabric, model, optimizer = setup(1, "32-true", 0)
    step(fabric, model, optimizer, 0)
    optimizer.step()
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    for mine in run_in_ranks(2, from_float32, mode, tmp_path / "last"):
        assert all(map(torch.equal, mine, [param.detach() for param in model.parameters()]))


def overflows() -> tuple[list[bool], float, bool]:
    """Returns whether each of two steps was skipped, the scale, and whether the first left the masters."""
    fabric, model, optimizer = setup(2, "16-master", 0)
    before, skipped = values(fabric, model), []
    for factor in (1e8 if fabric.global_rank else 1.0, 1.0):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(4, 5)).pow(2).mean() * factor)
        optimizer.step()
        skipped.append(fabric.last_step_skipped)
        if len(skipped) == 1:
            kept = all(map(torch.equal, before, values(fabric, model)))
    return skipped, fabric.precision_plugin.scale, kept


def test_an_overflow_on_one_rank_is_skipped_on_all() -> None:
    assert run_in_ranks(2, overflows) == [([True, False], 2.0**7, True)] * 2


def test_a_scaler_is_for_modes_that_scale() -> None:
    precision = FSDPPrecision("16-master", scaler={"init_scale": 8.0})
    assert precision.scale == 8.0
    with pytest.raises(ValueError, match=r"FSDPPrecision\('bf16-master', scaler=...\): this policy does not scale"):
        FSDPPrecision("bf16-master", scaler={"init_scale": 8.0})


def rounded(ranks: int) -> list[Tensor]:
    fabric = Fabric("cpu", devices=ranks, strategy=FSDPStrategy() if ranks > 1 else "auto", precision="bf16-stochastic")
    model = make_net(fabric.global_rank)  # the seed of torch's generators differs from rank to rank, too
    optimizer = AdamW(model.parameters(), lr=1e-4)
    fabric.setup(model, optimizer)
    for _ in range(3):
        set_gradients(fabric, model)
        optimizer.step()
    return [full(param.detach()) for param in model.parameters()]


def test_rounding_by_chance_is_the_same_on_any_number_of_ranks() -> None:
    alone = rounded(1)
    for ranks in (2, 3):
        assert all(all(map(torch.equal, mine, alone)) for mine in run_in_ranks(ranks, rounded, ranks))
