"""Checkpoints of an engine, read by strategies without one: weights by value, the optimizer's state by conversion."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_core.checkpoint import CheckpointError
from precision_core.testing import run_in_ranks
from precision_deepspeed import DeepSpeedStrategy, consolidated_optimizer_state_dict, consolidated_state_dict

INPUT = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[3].bias.requires_grad_(False)  # type: ignore[union-attr]
    decayed = [param for param in model.parameters() if param.dim() > 1]
    rest = [param for param in model.parameters() if param.dim() < 2]
    groups = [{"params": rest, "lr": 0.02, "weight_decay": 0.0}, {"params": decayed}]
    return model, torch.optim.AdamW(groups, lr=0.01)


def steps(fabric: Fabric, model: nn.Module, optimizer: Any, count: int = 3) -> list[float]:
    losses = []
    for _ in range(count):
        loss = model(INPUT).float().pow(2).mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def written(folder: Path, stage: int, mode: str) -> list[float]:
    """Trains, saves, and returns the losses of the three steps after that."""
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage), precision=mode)
    model, optimizer = fabric.setup(*make(0))
    steps(fabric, model, optimizer)
    fabric.save(folder / "last", {"all": {"model": model, "optimizer": optimizer}, "epoch": 7})
    later = steps(fabric, model, optimizer)
    fabric.teardown()
    return later


def resumed(path: Path, strategy: str, mode: str) -> list[float]:
    fabric = Fabric(accelerator="cpu", strategy=strategy, precision=mode)
    model, optimizer = fabric.setup(*make(1))
    state: dict[str, Any] = {"all": {"model": model, "optimizer": optimizer}, "epoch": 0}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"all\.optimizer: DeepSpeed's.*consolidated_optimizer_state_dict\("):
            fabric.load(path, state, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and state["epoch"] == 0
    with pytest.raises(CheckpointError, match=r"safetensors: read its weights with fabric\.load\("):
        fabric.load_module(path, model)
    weights = {"all": {"model": model}, "epoch": 0}
    fabric.load(path, weights)
    assert weights["epoch"] == 7
    optimizer.load_state_dict(consolidated_optimizer_state_dict(path))
    losses = steps(fabric, model, optimizer)
    fabric.teardown()
    return losses


CASES = [(3, "32-true", "ddp")]
REST = [
    *((stage, "32-true", "auto") for stage in (0, 2)),
    *((1, "bf16-mixed", "auto"), (3, "16-mixed", "auto"), (0, "bf16-true", "auto")),
]


@pytest.mark.parametrize(
    ("stage", "mode", "strategy"), [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)]
)
def test_other_strategies_read_the_weights_and_take_the_converted_state(
    tmp_path: Path, stage: int, mode: str, strategy: str
) -> None:
    expected = run_in_ranks(2, written, tmp_path, stage, mode)[0]
    plain = mode.replace("bf16-true", "bf16-mixed")  # plain bfloat16 has no master weights to load into
    for losses in run_in_ranks(2 if strategy == "ddp" else 1, resumed, tmp_path / "last", strategy, plain):
        assert losses == pytest.approx(expected, rel=1e-5 if mode == "32-true" else 2e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what strict=False leaves out
        for change in ({}, {"strict": False}):
            for path in (tmp_path / "last", tmp_path / "last" / "state.ckpt"):
                fabric = Fabric(accelerator="cpu", precision="32-true")
                model = fabric.setup(make(2)[0])
                fabric.load(path, {"all": {"model": model}}, **change)  # type: ignore[arg-type]
                assert_alike(model.state_dict(), consolidated_state_dict(tmp_path / "last"))
    content = Fabric(accelerator="cpu").load(tmp_path / "last")
    assert_alike(content["all"]["model"], consolidated_state_dict(tmp_path / "last"))
    assert content["epoch"] == 7


def assert_alike(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name


def test_16_true_is_read_by_16_mixed(tmp_path: Path, float16_ranks: Callable[..., Any]) -> None:
    run_in_ranks(1, float16_ranks, written, tmp_path, 2, "16-true")
    fabric = Fabric(accelerator="cpu", precision="16-mixed")
    model, optimizer = fabric.setup(*make(2))
    fabric.load(tmp_path / "last", {"all": {"model": model}})
    assert_alike(model.state_dict(), consolidated_state_dict(tmp_path / "last"))
    optimizer.load_state_dict(consolidated_optimizer_state_dict(tmp_path / "last"))
    assert all(map(torch.isfinite, map(torch.tensor, steps(fabric, model, optimizer))))


def test_damage_is_named_as_such(tmp_path: Path) -> None:
    run_in_ranks(1, written, tmp_path, 2, "32-true")
    shard = next((tmp_path / "last").glob("*model_states.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    fabric = Fabric(accelerator="cpu")
    model = fabric.setup(make(2)[0])
    with pytest.raises(CheckpointError, match=f"{shard.name} does not match its checksum"):
        fabric.load(tmp_path / "last", {"all": {"model": model}})
