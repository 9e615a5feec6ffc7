"""Two processes: a run stopped in the middle of an epoch goes on bit for bit; overflows on any rank are survived."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from precision_core import MODES, Fabric
from precision_core.testing import run_in_ranks

STEPS = 7  # of 5 in an epoch: it stops in the middle of the second


class Run:
    """Dropout, shuffling, accumulation, clipping and a scheduler, on this rank."""

    def __init__(self, mode: str, kind: str, seed: int) -> None:
        Fabric.seed_everything(seed)
        self.fabric = Fabric(accelerator="cpu", devices=2, precision=mode)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.LayerNorm(8), nn.Linear(8, 1))
        fused = kind == "fused"
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4, fused=fused, foreach=kind == "foreach")
        self.scheduler = StepLR(optimizer, 3)
        self.model: Any = torch.compile(model, backend="eager") if kind == "compiled" else model
        _, self.optimizer = self.fabric.setup(self.model, optimizer)
        data = TensorDataset(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))
        self.loader = self.fabric.setup_dataloaders(DataLoader(data, batch_size=4, shuffle=True))
        self.done = 0

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
            "done": self.done,
        }

    def train(self, until: int) -> list[float]:
        losses: list[float] = []
        while self.done < until:
            for (x,) in self.loader:
                losses.append(self.step(x))
                self.done += 1
                if self.done == until:
                    break
        return losses

    def step(self, x: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        for half, last in ((x[:2], False), (x[2:], True)):
            with self.fabric.no_backward_sync(self.model, enabled=not last):
                loss = self.model(half).pow(2).mean() / 2
                self.fabric.backward(loss)
            total += loss.item()
        self.fabric.clip_gradients(self.model, self.optimizer, max_norm=1.0)
        self.optimizer.step()
        if not self.fabric.last_step_skipped:
            self.scheduler.step()
        return total

    def weights(self) -> list[float]:
        return [value for param in self.model.parameters() for value in param.double().flatten().tolist()]


def whole(mode: str, kind: str) -> tuple[list[float], list[float]]:
    run = Run(mode, kind, seed=1)
    return run.train(2 * STEPS), run.weights()


def first_half(mode: str, kind: str, path: Path) -> list[float]:
    run = Run(mode, kind, seed=1)
    losses = run.train(STEPS)
    run.fabric.save(path, run.state())
    return losses


def second_half(mode: str, kind: str, path: Path) -> tuple[list[float], list[float]]:
    run = Run(mode, kind, seed=99)
    run.train(2)
    state = run.state()
    run.fabric.load(path, state)
    run.done = state["done"]
    return run.train(2 * STEPS), run.weights()


FAST = {  # each mode, and each kind twice
    ("16-mixed", "foreach"),
    ("bf16-true", "foreach"),
    ("16-true", "fused"),
    ("64-true", "fused"),
    ("bf16-mixed", "compiled"),
    ("32-true", "compiled"),
}
CASES = [
    pytest.param(mode, kind, marks=[] if (mode, kind) in FAST else [pytest.mark.full])
    for kind in ("foreach", "fused", "compiled")
    for mode in MODES
]


@pytest.mark.parametrize(("mode", "kind"), CASES)
def test_resuming_in_new_processes_is_bit_exact(mode: str, kind: str, tmp_path: Path, request: Any) -> None:
    if kind == "compiled" and mode.endswith("true"):
        request.getfixturevalue("true_modes_compile")
    expected = run_in_ranks(2, whole, mode, kind)
    assert expected[0][0] != expected[1][0] and expected[0][1] == expected[1][1]
    halves = run_in_ranks(2, first_half, mode, kind, tmp_path / "half.ckpt")
    rest = run_in_ranks(2, second_half, mode, kind, tmp_path / "half.ckpt")
    for rank in range(2):
        assert halves[rank] + rest[rank][0] == expected[rank][0]
        assert rest[rank][1] == expected[rank][1]


def injected(seed: int, steps: int) -> tuple[int, int, int, float, list[float]]:
    fabric = Fabric(accelerator="cpu", devices=2, precision="16-mixed")
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    fabric.setup(model, optimizer)
    generator = torch.Generator().manual_seed(seed)  # the same on both ranks: each knows what the other does
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(fabric.global_rank))
    plugin, injected, skipped = fabric.precision_plugin, 0, 0
    for _ in range(steps):
        bad, which, value = torch.rand(3, generator=generator).tolist()
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        hit = bad < 0.1
        if hit and which < 0.66 and fabric.global_rank == (0 if which < 0.33 else 1):
            loss = loss * (float("inf") if value < 0.5 else float("nan"))
        elif hit and which >= 0.66:
            loss = loss * float("inf")
        fabric.backward(loss)
        optimizer.step()
        injected += hit
        skipped += fabric.last_step_skipped
        assert not hit or fabric.last_step_skipped
        assert all(param.isfinite().all() for param in model.parameters())
    assert skipped == plugin.skipped_steps and plugin.steps + skipped == steps
    return injected, skipped, plugin.steps, plugin.scale, model.weight.flatten().tolist()


@pytest.mark.parametrize(
    ("seed", "steps"), [(0, 200), *(pytest.param(seed, 500, marks=pytest.mark.full) for seed in (0, 1))]
)
def test_overflows_at_random_steps_and_ranks(seed: int, steps: int) -> None:
    first, second = run_in_ranks(2, injected, seed, steps)
    assert first == second
    count, skipped, made, _, _ = first
    assert 0.04 * steps < count <= skipped < count + 30 and made > 0.8 * steps - 20
