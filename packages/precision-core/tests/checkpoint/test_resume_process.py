"""2N steps are N steps, a save, a new process, a load, and N steps: bit for bit, in every mode."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from precision_core import MODES, Fabric, MixedPrecision

STEPS = 5  # of 2 batches each: an epoch has 7, so that the save is in the middle of the second
OPTIMIZERS: dict[str, Any] = {
    "foreach": lambda params: AdamW(params, lr=0.01, eps=1e-4, foreach=True),
    "fused": lambda params: AdamW(params, lr=0.01, eps=1e-4, fused=True),
    "momentum": lambda params: SGD(params, lr=0.05, momentum=0.9, nesterov=True),
}
CASES = [
    (mode, optimizer, compiled, workers)
    for mode in MODES
    for optimizer in OPTIMIZERS
    for compiled in (False, True)
    for workers in ((0, 2) if (mode, optimizer) == ("16-mixed", "fused") else (0,))
    if not (compiled and mode.endswith("true") and torch.__version__ < "2.12")
]
Case = tuple[str, str, bool, int]
FAST: list[Case] = [  # each mode, each optimizer; test_resume_ranks compiles
    ("16-mixed", "fused", False, 0),
    ("bf16-mixed", "foreach", False, 0),
    ("64-true", "foreach", False, 0),
    ("32-true", "momentum", False, 0),
    ("bf16-true", "fused", False, 0),
    ("16-true", "momentum", False, 0),
]
TIERS = [FAST, [case for case in CASES if case not in FAST]]


class Run:
    """Dropout, shuffling, accumulation, clipping, a schedule, and a scale that overflows."""

    def __init__(self, case: Case, seed: int) -> None:
        mode, optimizer, compiled, workers = case
        Fabric.seed_everything(seed)
        scaler = {"init_scale": 2.0**14, "growth_interval": 2, "growth_factor": 16.0}
        plugin: Any = MixedPrecision(mode, "cpu", scaler) if mode == "16-mixed" else mode
        self.fabric = Fabric(accelerator="cpu", precision=plugin)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.LayerNorm(8), nn.Linear(8, 1))
        self.model: Any = torch.compile(model, backend="eager") if compiled else model
        self.optimizer = OPTIMIZERS[optimizer](model.parameters())
        self.scheduler = OneCycleLR(self.optimizer, 0.1, total_steps=4 * STEPS)
        self.fabric.setup(self.model, self.optimizer)
        data = TensorDataset(torch.arange(84.0).reshape(21, 4).sin())
        self.loader = self.fabric.setup_dataloaders(DataLoader(data, 3, shuffle=True, num_workers=workers))
        self.state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
            "batches": 0,
        }

    def batches(self) -> Iterator[Tensor]:
        while True:
            for (batch,) in self.loader:
                yield batch

    def train(self, steps: int) -> list[Tensor]:
        """Returns the losses, and at last the parameters."""
        log: list[Tensor] = []
        for batch in self.batches():
            loss = self.model(batch).pow(2).mean()
            self.fabric.backward(loss)
            log.append(loss.detach())
            self.state["batches"] += 1
            if self.state["batches"] % 2 == 0:
                self.fabric.clip_gradients(self.model, self.optimizer, max_norm=0.5)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()
            if self.state["batches"] == 2 * steps:
                break
        return [*log, *(param.detach().clone() for param in self.model.parameters())]


def file(folder: Path, case: Case) -> Path:
    return folder / ("_".join(map(str, case)) + ".ckpt")


def resume(folder: Path, tier: int) -> None:
    """What the new process does: the second half of each case of a tier."""
    results = {}
    for case in TIERS[tier]:
        run = Run(case, seed=99)
        run.fabric.load(file(folder, case), run.state)
        run.state["batches"] = int(run.state["batches"])
        results[case] = run.train(2 * STEPS)
    torch.save(results, folder / "results.pt")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], list[Tensor]]:
    """Returns a case's second half, from one new process for all cases of its tier."""

    @cache
    def results(tier: int) -> dict[Case, list[Tensor]]:
        folder = tmp_path_factory.mktemp("resume")
        for case in TIERS[tier]:
            run = Run(case, seed=1)
            run.train(STEPS)
            run.fabric.save(file(folder, case), run.state)
        subprocess.run([sys.executable, __file__, str(folder), str(tier)], check=True)
        return dict(torch.load(folder / "results.pt", weights_only=True))

    return lambda case: results(int(case not in FAST))[case]


@pytest.mark.slow_start
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.full] * tier) for tier, cases in enumerate(TIERS) for case in cases],
    ids=lambda case: "-".join(map(str, case)),
)
def test_a_run_that_goes_on_in_a_new_process_is_the_run_that_was_never_stopped(
    case: Case, resumed: Callable[[Case], list[Tensor]]
) -> None:
    run = Run(case, seed=1)
    whole = run.train(2 * STEPS)
    for mine, theirs in zip(resumed(case), whole[2 * STEPS :], strict=True):
        assert mine.dtype is theirs.dtype and torch.equal(mine, theirs)
    assert case[0] != "16-mixed" or run.fabric.precision_plugin.skipped_steps > 0
    assert run.state["loader"].state_dict()["epoch"] == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    resume(Path(sys.argv[1]), int(sys.argv[2]))
