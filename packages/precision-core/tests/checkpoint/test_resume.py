"""Fabric.save and Fabric.load: a run that was interrupted goes on as if it had not been, bit for bit."""

from __future__ import annotations

import copy
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from precision_core import MODES, CheckpointError, Fabric, MixedPrecision
from precision_core.checkpoint.error import RESERVED

STEPS = 5
BAD = {
    "version": lambda header: header["precision"].update(version=9),
    "garbage": lambda header: header.update(precision={"scale": 3}),
    "scaler": lambda header: header["precision"].update(scaler={"scale": -1.0}),
}


class Run:
    """A GAN-like run with everything that has state: dropout, batch norm, two optimizers, two schedulers."""

    def __init__(self, mode: str, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.fabric = Fabric(accelerator="cpu", precision=self.plugin(mode))
        first = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.LayerNorm(8), nn.Linear(8, 4))
        second = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 1))
        self.first: Any = torch.compile(first, backend="eager") if compiled else first
        self.second = second
        self.adam = AdamW(first.parameters(), lr=0.01, eps=1e-4)
        self.sgd = SGD(second.parameters(), lr=0.05, momentum=0.9)
        self.schedulers = {"once": OneCycleLR(self.adam, 0.1, total_steps=20), "steps": StepLR(self.sgd, 2)}
        self.fabric.setup(self.first, self.adam)
        self.fabric.setup(self.second, self.sgd)
        self.done = 0

    def plugin(self, mode: str) -> Any:  # a scale that grows, overflows and shrinks within the run
        scaler = {"init_scale": 2.0**14, "growth_interval": 2, "growth_factor": 16.0}
        return MixedPrecision(mode, device="cpu", scaler=scaler) if mode == "16-mixed" else mode

    def state(self) -> dict[str, Any]:
        return {
            "models": {"first": self.first, "second": self.second},
            "adam": self.adam,
            "sgd": self.sgd,
            "schedulers": self.schedulers,
            "done": self.done,
            "shape": (3, (4, "x")),
        }

    def train(self, steps: int) -> Iterator[Tensor]:
        for _ in range(steps):
            x = torch.randn(3, 4) * random.random() + float(np.random.rand())
            self.adam.zero_grad()
            self.sgd.zero_grad()
            loss = self.second(self.first(x)).pow(2).mean()
            self.fabric.backward(loss)
            self.fabric.clip_gradients(self.first, self.adam, max_norm=1.0)
            for optimizer in (self.adam, self.sgd):
                optimizer.step()
            for scheduler in self.schedulers.values():
                scheduler.step()
            self.done += 1
            yield loss.detach()

    def counters(self) -> tuple[Any, ...]:
        plugin = self.fabric.precision_plugin
        return plugin.steps, plugin.skipped_steps, plugin.last_step_skipped, plugin.scale


@pytest.mark.parametrize(
    ("mode", "compiled"),
    [
        *((mode, False) for mode in MODES),
        ("16-mixed", True),
        ("bf16-true", True),
    ],
)
def test_resuming_is_bit_exact(mode: str, compiled: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if compiled and mode.endswith("true"):
        request.getfixturevalue("true_modes_compile")
    Fabric.seed_everything(1)
    whole = Run(mode)
    Fabric.seed_everything(2)
    expected = list(whole.train(2 * STEPS))

    Fabric.seed_everything(1)
    first = Run(mode)
    Fabric.seed_everything(2)
    losses = list(first.train(STEPS))
    first.fabric.save(tmp_path / "last.ckpt", first.state())

    Fabric.seed_everything(99)
    second = Run(mode, compiled)
    list(second.train(1))
    state = second.state()
    assert second.fabric.load(str(tmp_path / "last.ckpt"), state) == {}
    assert state["done"] == STEPS and state["shape"] == (3, (4, "x"))
    assert second.counters() == first.counters()
    losses += list(second.train(STEPS))
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert second.counters() == whole.counters() and (mode != "16-mixed" or whole.counters()[1] > 0)
    for mine, theirs in zip((second.first, second.second), (whole.first, whole.second), strict=True):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert a.dtype is b.dtype and torch.equal(a, b)
    assert second.adam.param_groups[0]["lr"] == whole.adam.param_groups[0]["lr"]


# ---------------------------------------------------------------- load


def small(mode: str = "bf16-mixed", seed: int = 0) -> tuple[Fabric, nn.Module, SGD]:
    torch.manual_seed(seed)
    plugin: Any = MixedPrecision(mode, "cpu", {"init_scale": 8.0}) if mode == "16-mixed" else mode
    fabric, model = Fabric(accelerator="cpu", precision=plugin), nn.Linear(2, 2)
    return fabric, *fabric.setup(model, SGD(model.parameters(), lr=0.1, momentum=0.9))


def snapshot(fabric: Fabric, *objects: Any) -> str:
    streams = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return str([fabric.precision_plugin.state_dict(), [each.state_dict() for each in objects], streams])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    fabric, model, optimizer = small("16-mixed")
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    fabric.save(tmp_path / "last.ckpt", {"model": model, "optimizer": optimizer, "epoch": 3})
    return tmp_path / "last.ckpt"


def test_without_a_state_nothing_live_is_touched(path: Path) -> None:
    fabric, model, optimizer = small("16-mixed", seed=1)
    before = snapshot(fabric, model, optimizer)
    loaded = fabric.load(path)
    assert snapshot(fabric, model, optimizer) == before
    assert set(loaded) == {"model", "optimizer", "epoch"} and loaded["epoch"] == 3
    moved = small()[1].weight - loaded["model"]["weight"]
    assert torch.allclose(moved, torch.tensor(0.1))  # the one step of SGD that it was saved after


def test_the_rest_comes_back_and_the_precision_is_restored(path: Path) -> None:
    fabric, model, _ = small("16-mixed", seed=1)
    rest = fabric.load(path, {"model": model})
    assert set(rest) == {"optimizer", "epoch"}
    assert fabric.precision_plugin.steps == 1


@pytest.mark.parametrize("spoil", ["shape", "garbage", "version", "scaler"])
def test_what_does_not_fit_changes_nothing_at_all(spoil: str, path: Path) -> None:
    fabric, model, optimizer = small("16-mixed", seed=1)
    if spoil == "shape":
        model.bias = nn.Parameter(torch.ones(3))
    else:
        content = torch.load(path, weights_only=True)
        BAD[spoil](content[RESERVED])
        torch.save(content, path)
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    before = snapshot(fabric, model, optimizer)
    with pytest.raises(CheckpointError):
        fabric.load(path, state)
    assert snapshot(fabric, model, optimizer) == before and state["epoch"] == 0


def test_a_checkpoint_of_another_mode_loads_where_no_value_is_lost(path: Path) -> None:
    fabric, model, optimizer = small("64-true", seed=1)
    fabric.load(path, {"model": model, "optimizer": optimizer})
    saved = torch.load(path, weights_only=True)
    assert torch.equal(model.weight, saved["model"]["weight"].double()) and model.weight.dtype is torch.float64
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert all(buffer.dtype is torch.float64 for buffer in buffers)
    assert "loaded the state of '16-mixed' into '64-true'" in fabric.precision_plugin.report.notes[-1]
    fabric, model, _ = small("bf16-true", seed=1)
    with pytest.raises(CheckpointError, match=r"torch\.float32 in the checkpoint, torch\.bfloat16 in the model"):
        fabric.load(path, {"model": model})
    fabric.load(path, {"model": model}, strict=False)
    assert torch.equal(model.weight, saved["model"]["weight"].bfloat16())


def test_a_state_is_a_dict_without_the_reserved_key(path: Path) -> None:
    fabric, model, _ = small()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="state is a dict without the key '__precision__'"):
        fabric.save(path, {RESERVED: 1})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrong, cure in (
        (model, r'{"model": model}), or fabric.{}_module(path, model) for its weights alone'),
        (optimizer, r'{"optimizer": optimizer})'),
        (torch.optim.lr_scheduler.StepLR(optimizer, 1), r'{"scheduler": scheduler})'),
        (fabric.precision_plugin, r'{"state": state})'),
        ([model], r'{"model": model, "step": step})'),
        (3, r'{"model": model, "step": step})'),
    ):
        for name, call in (("save", fabric.save), ("load", fabric.load)):
            said = f"fabric.{name}(path, state): state must be a dict, not {type(wrong).__name__}: fabric.{name}(path, "
            with pytest.raises(ValueError, match=re.escape(said + cure.replace("fabric.{}", f"fabric.{name}"))):
                call(path, wrong)  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"fabric\.save\(path, \.\.\.\): path must be a str or a path object, not dict"):
        fabric.save({"model": model}, path)  # type: ignore[arg-type]
    assert path.read_bytes() == before


def test_saving_changes_nothing_and_the_file_is_torchs(path: Path) -> None:
    fabric, model, optimizer = small()
    nested = {"models": {"a": model}, "args": {"lr": 0.1, "betas": (0.9, 0.99)}, "note": None}
    before, kept = snapshot(fabric, model, optimizer), copy.copy(nested)
    fabric.save(str(path), nested)
    assert snapshot(fabric, model, optimizer) == before and nested == kept
    content = torch.load(path, weights_only=True)
    assert content["args"] == nested["args"] and torch.equal(content["models"]["a"]["bias"], model.bias)
    assert content[RESERVED]["policy"] == "bf16-mixed" and set(content[RESERVED]["rng"]) == {"python", "numpy", "torch"}


def test_an_unsaveable_value_is_named_and_the_old_file_stays(path: Path) -> None:
    fabric, model, _ = small()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"cannot save \['args'\]\['out'\]: a pathlib\.PosixPath"):
        fabric.save(path, {"model": model, "args": {"out": path}})
    assert path.read_bytes() == before and os.listdir(path.parent) == ["last.ckpt"]


def test_a_missing_file_is_pythons_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nothing\.ckpt"):
        Fabric(accelerator="cpu").load(tmp_path / "nothing.ckpt")
