"""Samples: values against what the loop itself has, in the step that is sampled and in no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from precision_lab import watch
from precision_lab.watching.sampled import ELEMENTS


def samples(path: Path) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if "sample" in line]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.lstm = nn.LSTM(8, 8)
        self.head = nn.Linear(8, 2)
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out, _ = self.lstm(self.body(x))
        logits = self.head(out)
        if torch.is_grad_enabled():
            out.retain_grad()
            logits.retain_grad()
            self.seen = {"lstm": out, "head": logits}
        return {"loss": logits.square().mean(), "logits": logits}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_the_loops(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Net().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    kept: list[dict[str, tuple[Tensor, Tensor | None]]] = []
    with watch(model, optimizer, every=2, file=tmp_path / "a.jsonl"):
        for _ in range(4):
            loss = model(torch.randn(5, 3, 6, dtype=dtype))["loss"]
            loss.backward()
            kept.append({name: (value.detach(), value.grad) for name, value in model.seen.items()})
            kept[-1] |= {name: (param.grad.clone(), None) for name, param in model.named_parameters()}
            old = {name: param.detach().clone() for name, param in model.named_parameters()}
            optimizer.step()
            same = {
                name: (param == old[name])[kept[-1][name][0] != 0].double().mean().item()
                for name, param in model.named_parameters()
            }
            optimizer.zero_grad()
    found = samples(tmp_path / "a.jsonl")
    assert [line["sample"] for line in found] == [2, 4]
    assert set(found[0]["modules"]) == {"", "body.0", "body.1", "body.2", "lstm", "head"}  # body is body.2
    for line, step in zip(found, (kept[1], kept[3]), strict=True):
        for name in ("lstm", "head"):
            value, gradient = step[name]
            assert gradient is not None
            for kind, tensor in (("output", value), ("gradient", gradient)):
                seen = line["modules"][name][kind]
                assert seen["amax"] == pytest.approx(tensor.abs().max().item(), rel=1e-4)
                assert seen["dtype"] == str(dtype).removeprefix("torch.")
                zero = (tensor != 0) & (tensor.to(torch.float8_e5m2).float() == 0)
                share = seen.get("as", {}).get("float8_e5m2", {}).get("zero", 0)
                assert share == pytest.approx(zero.double().mean().item(), abs=1e-5)
        for name, _ in model.named_parameters():
            amax = line["parameters"][name]["gradient"]["amax"]
            assert amax == pytest.approx(step[name][0].abs().max().item(), rel=1e-4)
            assert ("unchanged" in line["parameters"][name]) == (dtype is torch.bfloat16)
    zeros = found[0]["modules"]["body.1"]["output"]["zero"]
    assert 0.2 < zeros < 0.8
    if dtype is torch.bfloat16:
        swallowed = [found[1]["parameters"][name]["unchanged"] for name in same]
        assert min(swallowed) > 0.5
        assert any("change nothing" in note for note in found[1]["notes"])


def test_half_updates_that_are_kept_elsewhere_are_not_counted(tmp_path: Path) -> None:
    from precision_core import Fabric

    fabric = Fabric(precision="bf16-master", accelerator="cpu")
    model = nn.Linear(32, 32)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1e-6))
    with watch(model, optimizer, every=1, file=tmp_path / "a.jsonl"):
        for _ in range(2):
            fabric.backward(model(torch.randn(4, 32)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert all(
        "unchanged" not in seen for line in samples(tmp_path / "a.jsonl") for seen in line["parameters"].values()
    )
    assert all(len(line["parameters"]) == 2 for line in samples(tmp_path / "a.jsonl"))


def test_what_would_be_zero_is_noted(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, every=1, file=tmp_path / "a.jsonl"):
        (model(torch.randn(64, 4)).mean() * 1e-5).backward()
        optimizer.step()
    (line,) = samples(tmp_path / "a.jsonl")
    assert "under float8_e5m2, 100% of 0's gradients would be zero" in line["notes"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(tmp_path: Path, reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(checkpoint(self.a, x, use_reentrant=reentrant))

    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=1, file=tmp_path / "a.jsonl") as watched:
        for _ in range(2):
            model(torch.randn(3, 4, requires_grad=True)).square().mean().backward()
            optimizer.step()
    assert watched.steps == 2
    for line in samples(tmp_path / "a.jsonl"):
        assert {name: set(seen) for name, seen in line["modules"].items() if name} == {
            name: {"output", "gradient"} for name in ("a", "b")
        }


def test_a_large_tensor_is_sampled_all_over(tmp_path: Path) -> None:
    """A stride that divides the width would look at some channels alone."""
    model = nn.Linear(4, 64, bias=False)
    with torch.no_grad():
        model.weight[::2] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16 * ELEMENTS // 64, 4)
    x[-1] = 1e3
    with watch(model, optimizer, every=1, file=tmp_path / "a.jsonl"):
        model(x).sum().backward()
        optimizer.step()
    (line,) = samples(tmp_path / "a.jsonl")
    assert line["modules"][""]["output"]["zero"] == pytest.approx(0.5, abs=0.02)
    assert line["modules"][""]["output"]["amax"] > 100
