"""Losses that are scaled, and steps that are skipped, by torch's scaler, by ours, and on the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_lab import watch


def read(path: Path) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if "step" in line and "alarm" not in line]


def make(fused: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)


def loss_of(model: nn.Module, factor: float) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return model(torch.randn(4, 8)).float().square().mean() * factor


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_torchs_scaler(tmp_path: Path, fused: bool, scheduled: bool) -> None:
    """Fused optimizers skip on the device: their step is called all the same."""
    model, optimizer = make(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    if scheduled:  # which puts a step of its own on the optimizer
        torch.optim.lr_scheduler.StepLR(optimizer, 10)
    expected = []
    with watch(model, optimizer, every=2, file=tmp_path / "a.jsonl") as watched:
        for number in range(8):
            scale = scaler.get_scale()
            loss = loss_of(model, 1e9 if number in (2, 3, 5) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            expected.append((loss.item(), scale, scaler.get_scale() < scale))
    assert [(line["loss"], line["scale"], line["skipped"]) for line in read(tmp_path / "a.jsonl")] == expected
    assert [skipped for *_, skipped in expected] == [number in (2, 3, 5) for number in range(8)]
    assert not watched.alarms


def test_ten_skips_in_a_row_are_one_alarm(tmp_path: Path) -> None:
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu")
    with watch(model, optimizer, file=tmp_path / "a.jsonl") as watched:
        for number in range(40):
            scaler.scale(loss_of(model, 1e30 if 5 <= number < 18 or 20 <= number < 29 else 1.0)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    (alarm,) = watched.alarms
    assert (alarm.kind, alarm.step, alarm.before_step) == ("skips", 15, True)
    assert [line["norm"] for line in read(tmp_path / "a.jsonl")][5] in ("nan", "inf")


def test_a_loss_that_is_not_finite_is_an_alarm_under_a_scaler_too(tmp_path: Path) -> None:
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu")
    with watch(model, optimizer, file=tmp_path / "a.jsonl") as watched:
        for number in range(20):
            scaler.scale(loss_of(model, float("inf") if number > 3 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert [(alarm.kind, alarm.step) for alarm in watched.alarms] == [("loss", 5)]


@pytest.mark.parametrize("mode", ["16-mixed", "bf16-mixed"])
def test_our_fabric(tmp_path: Path, mode: str) -> None:
    model, optimizer = make()
    fabric = Fabric(precision=mode, accelerator="cpu")
    model, optimizer = fabric.setup(model, optimizer)
    expected = []
    with watch(model, optimizer, every=3, file=tmp_path / "a.jsonl") as watched:
        for number in range(8):
            scale = fabric.precision_plugin.scale
            loss = model(torch.randn(4, 8)).square().mean() * (1e9 if mode == "16-mixed" and number in (2, 3) else 1.0)
            fabric.backward(loss)
            norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            expected.append((loss.item(), norm.item(), scale, fabric.last_step_skipped))
    lines = read(tmp_path / "a.jsonl")
    assert [(line["loss"], line.get("scale", 1.0), line.get("skipped", False)) for line in lines] == [
        (loss, scale, skipped) for loss, _, scale, skipped in expected
    ]
    assert [float(line["norm"]) for line in lines] == pytest.approx([norm for _, norm, *_ in expected], nan_ok=True)
    assert fabric.precision_plugin.skipped_steps == sum(line.get("skipped", False) for line in lines)
    assert fabric.precision_plugin.skipped_steps == (2 if mode == "16-mixed" else 0) and not watched.alarms
    for _ in range(2):  # and goes on without
        fabric.backward(model(torch.randn(4, 8)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert len(read(tmp_path / "a.jsonl")) == 8


def test_a_wrapped_optimizer_and_scale_of_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, optimizer = make()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    with watch(model, optimizer, file=tmp_path / "a.jsonl"):
        for _ in range(3):
            loss = model(torch.randn(4, 8)).float().square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    lines = read(tmp_path / "a.jsonl")
    assert [line["loss"] for line in lines] == losses and all(line["norm"] > 0 for line in lines)
