"""What is kept of a forward runs it once more, bit for bit, with the gradients that its outputs got."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_lab import watch
from precision_lab.watching.alarms import Alarm
from precision_lab.watching.batch import Batch
from precision_lab.watching.watch import Watch


class Net(nn.Module):
    """Gives its loss beside what that was computed of, as transformers' models do, and something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor, *, factor: float) -> dict[str, Tensor]:
        hidden = nn.functional.dropout(self.body(x), 0.5, self.training)
        logits = self.head(hidden)
        return {"loss": logits.float().square().mean() * factor, "logits": logits, "other": self.other(hidden)}


def test_it_runs_once_more(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched: Watch
    with watch(model, optimizer, file=tmp_path / "a.jsonl") as watched:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(torch.randn(3, 4), factor=2.0)
            ((out["loss"] + out["other"].float().mean()) / 4).backward()
            torch.randn(7)
            batch: Batch | None = watched.current.batch
            assert batch is not None
            expected = [param.grad.clone() for param in model.parameters() if param.grad is not None]
            kept = batch
            if _ == 0:
                optimizer.step()
                optimizer.zero_grad()
    state = torch.get_rng_state()
    kept.random.restore()
    with kept.context():
        assert torch.is_autocast_enabled("cpu")
        again = model(*kept.args, **kept.kwargs)
    torch.set_rng_state(state)
    assert not torch.is_autocast_enabled("cpu")
    assert all(torch.equal(again[name], out[name]) for name in out)
    loss, logits, other = kept.gradients
    assert logits is None and loss is not None and other is not None and loss.item() == 0.25
    optimizer.zero_grad()
    torch.autograd.backward([again["loss"], again["other"]], [loss, other])
    for param, gradient in zip(model.parameters(), expected, strict=True):
        assert param.grad is not None and torch.equal(param.grad, gradient)


def test_the_graph_of_a_step_is_freed(tmp_path: Path) -> None:
    import gc
    import weakref

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Any] = []
    gc.collect()
    gc.disable()
    try:
        with watch(model, optimizer, every=1, file=tmp_path / "a.jsonl"):
            for _ in range(3):
                out = model(torch.randn(3, 4), factor=1.0)
                out["loss"].backward()
                optimizer.step()
                seen += [weakref.ref(out["loss"]), weakref.ref(out["logits"])]
                del out
            assert [each() for each in seen] == [None] * 6  # without the garbage collector
    finally:
        gc.enable()


def test_an_alarm_is_explained_or_says_why_not(tmp_path: Path) -> None:
    model = Net()
    told: list[Alarm] = []
    state = []

    def on_alarm(alarm: Alarm) -> None:
        told.append(alarm)
        state.append(torch.get_rng_state())

    with watch(model, file=tmp_path / "a.jsonl", on_alarm=on_alarm):
        loss = model(torch.randn(3, 4), factor=float("inf"))["loss"]
        before = torch.get_rng_state()
        loss.backward()
    (alarm,) = told
    assert (alarm.explanation is None) == bool(alarm.unexplained) and torch.equal(state[0], before)
    assert pytest.approx(alarm.value) == float("inf")
