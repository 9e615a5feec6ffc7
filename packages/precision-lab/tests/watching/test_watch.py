"""A loop under watch computes the same bits; its lines say what it did; each mistake is told once, before the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimizer_module

from precision_lab import watch
from precision_lab.watching.alarms import Alarm
from precision_lab.watching.watch import Watch

Lines = list[dict[str, Any]]


def read(path: Path) -> Lines:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def steps(path: Path) -> Lines:
    return [line for line in read(path) if "step" in line and "alarm" not in line]


class Loop:
    """A hand-written loop, with a dropout that depends on the random state."""

    def __init__(self, dtype: torch.dtype = torch.float32, lr: float = 1e-2) -> None:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.1))
        self.model = nn.Sequential(block, nn.Linear(16, 4)).to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.dtype = dtype
        self.losses: list[float] = []
        self.norms: list[float] = []

    def loss(self, x: Tensor | None = None) -> Tensor:
        x = torch.randn(8, 16) if x is None else x
        return nn.functional.cross_entropy(self.model(x.to(self.dtype)).float(), torch.randint(4, (8,)))

    def step(self, factor: float = 1.0, clip: bool = False) -> None:
        loss = self.loss() * factor
        loss.backward()
        self.losses.append(loss.item())
        if clip:
            self.norms.append(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loop_computes_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    results = []
    for watched in (True, False):
        loop = Loop(dtype)
        context = watch(loop.model, loop.optimizer, every=2, file=tmp_path / "a.jsonl") if watched else nullcontext()
        with context:
            for number in range(5):
                loop.step(factor=float("nan") if number == 4 else 1.0, clip=number % 2 == 0)
        results.append((loop.losses[:4], loop.values(), torch.get_rng_state()))
    assert results[0][0] == results[1][0] and torch.equal(results[0][2], results[1][2])
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_lines_say_what_each_step_did(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.jsonl"
    loop = Loop()
    with watch(loop.model, loop.optimizer, every=50, file=path) as watched:
        for _ in range(3):
            loop.step(clip=True)
        assert watched.steps == 2  # the third ends where the next begins, or here
    first, *_, last = read(path)
    assert first["watch"] == 1 and first["models"] == ["Sequential"] and first["optimizers"] == ["AdamW"]
    assert first["parameters"] == {"float32": sum(param.numel() for param in loop.model.parameters())}
    assert [line["step"] for line in steps(path)] == [1, 2, 3]
    assert [line["loss"] for line in steps(path)] == loop.losses
    assert [line["norm"] for line in steps(path)] == loop.norms
    assert all(line["seconds"] > 0 for line in steps(path)) and "scale" not in steps(path)[0]
    assert (last["end"], last["alarms"], last["error"], last["unseen"]) == (3, 0, None, [])
    assert watched.steps == 3 and watched.alarms == [] and watched.path == str(path)
    with watch(loop.model, file=path):  # is added
        loop.step()
    assert [line["step"] for line in steps(path)] == [1, 2, 3, 1]


def test_steps_of_accumulation_count_as_one(tmp_path: Path) -> None:
    loop = Loop()
    with watch(loop.model, file=tmp_path / "a.jsonl"):
        for _ in range(2):
            parts = []
            for _ in range(4):
                loss = loop.loss() / 4
                loss.backward()
                parts.append(loss.item())
            loop.losses.append(sum(parts))
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert [line["loss"] for line in steps(tmp_path / "a.jsonl")] == loop.losses


def test_a_norm_that_the_loop_does_not_compute_is_sampled(tmp_path: Path) -> None:
    loop = Loop()
    with watch(loop.model, every=2, file=tmp_path / "a.jsonl"):
        for _ in range(3):
            loop.step()
        loop.loss().backward()
        loop.loss().backward()
        both = torch.cat([param.grad.flatten() for param in loop.model.parameters() if param.grad is not None]).norm()
        loop.optimizer.step()
    found = [line.get("norm") for line in steps(tmp_path / "a.jsonl")]
    assert found[0] is None and found[2] is None
    assert found[3] == pytest.approx(both.item(), rel=1e-5)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_one_alarm_before_the_step(tmp_path: Path, bad: str) -> None:
    told: list[tuple[Alarm, list[Tensor]]] = []
    loop = Loop()
    with watch(
        loop.model,
        loop.optimizer,
        file=tmp_path / "a.jsonl",
        on_alarm=lambda alarm: told.append((alarm, loop.values())),
    ) as watched:
        for number in range(6):
            before = loop.values()
            if number == 3:
                (loop.loss() * float(bad)).backward()
                assert len(told) == 1
                loop.optimizer.zero_grad()  # the loop goes on without that step
            else:
                loop.step()
                assert len(told) == (number > 3)
    alarm, values = told[0]
    assert watched.alarms == [alarm] and (alarm.kind, alarm.step, str(alarm.value)) == ("loss", 4, bad)
    assert alarm.before_step and all(map(torch.equal, values, before)) is False
    assert alarm.line is not None and alarm.line.text == "(loop.loss() * float(bad)).backward()"
    (line,) = [line for line in read(tmp_path / "a.jsonl") if "alarm" in line]
    assert (line["alarm"], line["value"], line["line"]) == ("loss", bad, alarm.line.number)


def test_what_stays_broken_is_told_once_and_what_breaks_again_once_more(tmp_path: Path) -> None:
    loop = Loop()
    with watch(loop.model, file=tmp_path / "a.jsonl") as watched:
        for number in range(9):
            loss = loop.loss() * (float("nan") if number in (2, 3, 6) else 1.0)
            loss.backward()
            if not loss.isnan():
                loop.optimizer.step()
            else:
                loop.optimizer.param_groups[0]["lr"] = 0.0
                loop.optimizer.zero_grad()
                loop.loss().mul(0).backward()
                loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert [alarm.kind for alarm in watched.alarms] == ["loss", "loss"]
    assert [alarm.step for alarm in watched.alarms] == [3, 7]


def test_a_norm_that_is_not_finite_is_an_alarm(tmp_path: Path) -> None:
    loop = Loop()
    with watch(loop.model, file=tmp_path / "a.jsonl") as watched:
        loop.step(clip=True)
        loss = loop.loss()
        loss.backward()
        param = next(loop.model.parameters())
        assert param.grad is not None
        param.grad[0, 0] = float("inf")
        nn.utils.clip_grad_norm_(loop.model.parameters(), 1.0)
        assert [(alarm.kind, alarm.step, alarm.before_step) for alarm in watched.alarms] == [("gradients", 2, True)]


def test_a_spike_is_one_alarm(tmp_path: Path) -> None:
    loop = Loop(lr=0.0)
    with watch(loop.model, file=tmp_path / "a.jsonl") as watched:
        for number in range(60):
            loop.step(factor=10.0 if number in (40, 41) else 1.0)
    (alarm,) = watched.alarms
    assert (alarm.kind, alarm.step) == ("spike", 41) and alarm.value == pytest.approx(loop.losses[40])


def test_what_an_alarm_raises_ends_the_loop(tmp_path: Path) -> None:
    def stop(alarm: Alarm) -> None:
        raise FloatingPointError(alarm.text)

    loop = Loop()
    with (
        pytest.raises(FloatingPointError, match="the loss of step 2 is nan"),
        watch(loop.model, file=tmp_path / "a.jsonl", on_alarm=stop),
    ):
        loop.step()
        loop.step(factor=float("nan"))
    assert len(steps(tmp_path / "a.jsonl")) == 1 and read(tmp_path / "a.jsonl")[-1]["error"].startswith("FloatingPoint")


def test_nothing_stays_behind(tmp_path: Path) -> None:
    def state(loop: Loop) -> list[Any]:
        hooks = [(module._forward_hooks.copy(), module._forward_pre_hooks.copy()) for module in loop.model.modules()]
        calls: list[Callable[..., Any]] = [torch.Tensor.backward, torch.autograd.backward, nn.utils.clip_grad_norm_]
        scaler = torch.amp.GradScaler
        globals_ = optimizer_module._global_optimizer_pre_hooks.copy()
        return [hooks, calls, scaler.scale, scaler.step, globals_, loop.optimizer.__dict__.keys() - {"state"}]

    loop = Loop()
    before = state(loop)
    with pytest.raises(ZeroDivisionError), watch(loop.model, loop.optimizer, every=1, file=tmp_path / "a.jsonl"):
        loop.step()
        loop.loss()
        raise ZeroDivisionError
    assert state(loop) == before
    assert read(tmp_path / "a.jsonl")[-1]["error"] == "ZeroDivisionError: "
    with watch(loop.model, file=tmp_path / "a.jsonl"):  # another may follow
        loop.step()


def test_evaluation_in_between_is_not_counted(tmp_path: Path) -> None:
    loop = Loop()
    with watch(loop.model, every=1, file=tmp_path / "a.jsonl"):
        for _ in range(2):
            loop.step()
            loop.model.eval()
            with torch.no_grad():
                loop.model(torch.full((8, 16), 1e9))
            loop.model.train()
    samples = [line for line in read(tmp_path / "a.jsonl") if "sample" in line]
    assert [line["sample"] for line in samples] == [1, 2] and len(steps(tmp_path / "a.jsonl")) == 2
    assert all(each["output"]["amax"] < 100 for line in samples for each in line["modules"].values())


def test_several_optimizers(tmp_path: Path) -> None:
    """Of a loss that two optimizers step it is one step; where each has its loss, losses are not compared."""
    torch.manual_seed(0)
    one, two = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (one, two)]
    with watch(one, two, *optimizers, file=tmp_path / "a.jsonl") as watched:
        for _ in range(40):
            two(one(torch.ones(1, 4))).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert watched.steps == 40
    with watch(one, two, *optimizers, file=tmp_path / "b.jsonl") as watched:
        for number in range(60):
            one(torch.ones(1, 4)).square().mean().backward()
            optimizers[0].step()
            if number % 5 == 4:
                (two(torch.ones(1, 4)).square().mean() + 1e4).backward()
                optimizers[1].step()
    assert watched.steps == 72 and not watched.alarms


def test_a_loop_that_never_steps(tmp_path: Path) -> None:
    loop = Loop()
    with watch(loop.model, file=tmp_path / "a.jsonl") as watched:
        for _ in range(3):
            loop.loss().backward()
    assert watched.steps == 0 and steps(tmp_path / "a.jsonl") == []
    assert "no step of an optimizer" in read(tmp_path / "a.jsonl")[-1]["unseen"][0]


def test_an_optimizer_of_something_else_is_left_alone(tmp_path: Path) -> None:
    loop, other = Loop(), Loop()
    with watch(loop.model, file=tmp_path / "a.jsonl") as watched:
        other.optimizer.step()
        loop.step()
        other.optimizer.step()
    assert watched.steps == 1


def test_a_closure_runs_within_its_step(tmp_path: Path) -> None:
    loop = Loop()
    optimizer = torch.optim.LBFGS(loop.model.parameters(), max_iter=3, lr=1e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loop.loss(torch.ones(8, 16))
        loss.backward()
        return loss

    with watch(loop.model, file=tmp_path / "a.jsonl") as watched:
        for _ in range(2):
            optimizer.step(closure)
    assert watched.steps == 2 and all(line["loss"] > 0 for line in steps(tmp_path / "a.jsonl"))


def test_what_is_refused(tmp_path: Path) -> None:
    loop = Loop()
    with pytest.raises(TypeError, match="expected models and optimizers of torch, got int"):
        watch(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give the model, too"):
        watch(loop.optimizer)
    for every in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"watch\(every="):
            watch(loop.model, every=every)  # type: ignore[arg-type]
    outer: Watch
    with watch(loop.model, file=tmp_path / "a.jsonl") as outer:
        with pytest.raises(RuntimeError, match="another watch runs already"):
            watch(loop.model, file=tmp_path / "b.jsonl").__enter__()
        loop.step()
    assert outer.steps == 1
    with pytest.raises(FileExistsError), watch(loop.model, file=tmp_path / "a.jsonl" / "b.jsonl"):
        pass
    with watch(loop.model, file=tmp_path / "c.jsonl"):
        loop.step()
