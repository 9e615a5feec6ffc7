"""bf16-master under FSDP2: the rest of each weight is sharded with it, stepped as float32, and saved for any ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_fsdp import FSDPStrategy


def make_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))  # no size divides into 2 or 3


def setup(ranks: int, mode: str, seed: int) -> tuple[Fabric, nn.Module, Optimizer]:
    fabric = Fabric("cpu", devices=ranks, strategy=FSDPStrategy() if ranks > 1 else "auto", precision=mode)
    model = make_net(seed + fabric.global_rank)  # each rank draws weights of its own
    return fabric, *fabric.setup(model, AdamW(model.parameters(), lr=1e-4, foreach=True))


def step(fabric: Fabric, model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    for micro in range(2):
        with fabric.no_backward_sync(model, enabled=micro == 0):
            fabric.backward(model(torch.randn(4, 5, generator=generator)).pow(2).mean())
    fabric.clip_gradients(model, optimizer, max_norm=0.1)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def values(fabric: Fabric, model: nn.Module) -> list[Tensor]:
    return [full(fabric.precision_plugin.masters.value(param)) for param in model.parameters()]


def steps_as_float32_does(path: Path) -> list[Tensor]:
    fabric, model, optimizer = setup(2, "bf16-master", 0)
    start = [param.detach().clone() for param in make_net(0).parameters()]
    assert all(map(torch.equal, values(fabric, model), start))  # rank zero's bits, with its weights
    shards = [fabric.precision_plugin.masters.value(param).to_local() for param in model.parameters()]  # type: ignore[attr-defined]
    reference = [nn.Parameter(shard.clone()) for shard in shards]
    plain = AdamW(reference, lr=1e-4, foreach=True)
    for number in range(3):
        step(fabric, model, optimizer, number)
        for param, mine in zip(reference, model.parameters(), strict=True):
            param.grad = mine.grad.to_local().float()  # type: ignore[union-attr]
        optimizer.step()
        plain.step()
        exact = [fabric.precision_plugin.masters.value(param).to_local() for param in model.parameters()]  # type: ignore[attr-defined]
        assert all(map(torch.equal, exact, reference))
        state = optimizer.state[next(model.parameters())]
        assert {key: each.dtype for key, each in state.items()} == {
            "step": torch.float32,
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
            "master_rest": torch.int16,
        }
    fabric.save(path, {"model": model, "optimizer": optimizer})
    return values(fabric, model)


def set_gradients(model: nn.Module) -> None:
    """Gives each parameter, sharded or not, the same gradient."""
    for param in model.parameters():
        gradient = torch.arange(param.numel()).reshape(param.shape).to(param.dtype)
        if isinstance(param, DTensor):
            gradient = distribute_tensor(gradient, param.device_mesh, param.placements)
        param.grad = gradient


def loaded(ranks: int, mode: str, path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the values right after loading, and after one more step."""
    fabric, model, optimizer = setup(ranks, mode, 10)
    fabric.load(path, {"model": model, "optimizer": optimizer})
    first = [each.clone() for each in values(fabric, model)]
    set_gradients(model)
    optimizer.step()
    return first, values(fabric, model)


def test_shards_step_as_float32_does_and_resume_on_any_number_of_ranks(tmp_path: Path) -> None:
    path = tmp_path / "last"
    saved = run_in_ranks(2, steps_as_float32_does, path)[0]
    runs = {
        (1, "bf16-master"): loaded(1, "bf16-master", path),
        (1, "32-true"): loaded(1, "32-true", path),
        **{(ranks, "bf16-master"): run_in_ranks(ranks, loaded, ranks, "bf16-master", path)[0] for ranks in (2, 3)},
    }
    for first, then in runs.values():
        assert all(map(torch.equal, first, saved))
        assert all(map(torch.equal, then, runs[1, "32-true"][1]))


def from_float32(path: Path) -> list[Tensor]:
    fabric, model, optimizer = setup(2, "bf16-master", 10)
    fabric.load(path, {"model": model, "optimizer": optimizer})
    return values(fabric, model)


def test_a_float32_checkpoint_keeps_its_bits_in_shards(tmp_path: Path) -> None:
    fabric, model, optimizer = setup(1, "32-true", 0)
    step(fabric, model, optimizer, 0)
    optimizer.step()
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    for mine in run_in_ranks(2, from_float32, tmp_path / "last"):
        assert all(map(torch.equal, mine, [param.detach() for param in model.parameters()]))


def rounded(ranks: int) -> list[Tensor]:
    fabric = Fabric("cpu", devices=ranks, strategy=FSDPStrategy() if ranks > 1 else "auto", precision="bf16-stochastic")
    model = make_net(fabric.global_rank)  # the seed of torch's generators differs from rank to rank, too
    optimizer = AdamW(model.parameters(), lr=1e-4)
    fabric.setup(model, optimizer)
    for _ in range(3):
        set_gradients(model)
        optimizer.step()
    return [full(param.detach()) for param in model.parameters()]


def test_rounding_by_chance_is_the_same_on_any_number_of_ranks() -> None:
    alone = rounded(1)
    for ranks in (2, 3):
        assert all(all(map(torch.equal, mine, alone)) for mine in run_in_ranks(ranks, rounded, ranks))
