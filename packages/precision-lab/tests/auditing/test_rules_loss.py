"""Losses that are not scaled, scales that nobody takes off, half parameters under a scaler: each with its right "
"twin."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from precision_lab.auditing.context import audit
from precision_lab.auditing.finding import Finding
from precision_lab.auditing.report import Report

Step = Callable[[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler], None]


def watched(
    step: Step,
    kind: type[torch.optim.Optimizer] = torch.optim.SGD,
    scaler: torch.amp.GradScaler | None = None,
    dtype: torch.dtype = torch.float32,
    fails: type[Exception] | None = None,
) -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).to(dtype)
    optimizer = kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    scaler = scaler or torch.amp.GradScaler("cpu", init_scale=256.0)
    with audit(model, optimizer) as report:
        if fails is not None:
            with pytest.raises(fails):
                step(model, optimizer, scaler)
        for _ in range(2 if fails is None else 0):
            step(model, optimizer, scaler)
            optimizer.zero_grad()
    return report


def loss_of(model: nn.Module, dtype: torch.dtype = torch.float16) -> Tensor:
    with torch.autocast("cpu", dtype):
        return nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.tensor([0, 1, 0, 1]))


def codes(findings: list[Finding]) -> list[str]:
    return [each.code for each in findings]


def right(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    scaler.update()


def right_in_bfloat16(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    loss_of(model, torch.bfloat16).backward()
    optimizer.step()


def right_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    (loss_of(model) * 1024).backward()
    for param in model.parameters():
        param.grad /= 1024  # type: ignore[operator]
    optimizer.step()


def right_in_parts(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    losses = [scaler.scale(loss_of(model)) for _ in range(2)]
    torch.stack(losses).mean().backward()
    scaler.step(optimizer)
    scaler.update()


def right_evaluation_in_float16(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    with torch.no_grad():
        loss_of(model)
    nn.functional.mse_loss(model(torch.randn(4, 8)), torch.zeros(4, 2)).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "step",
    [right, right_in_bfloat16, right_by_hand, right_in_parts, right_evaluation_in_float16],
    ids=lambda step: step.__name__,
)
def test_right_loops_give_no_finding(step: Step) -> None:
    assert codes(watched(step).at("warning")) == []


# ---------------------------------------------------------------- no scale under float16


def no_scaler(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    loss = loss_of(model)
    loss.backward()  # here
    optimizer.step()


def by_autograd(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    torch.autograd.backward([loss_of(model) / 2])  # here
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("step", [no_scaler, by_autograd], ids=lambda step: step.__name__)
def test_an_unscaled_loss_under_float16_is_found(step: Step, kind: type[torch.optim.Optimizer]) -> None:
    (finding,) = watched(step, kind).at("warning")
    assert (finding.code, finding.level) == ("loss-unscaled", "error")
    assert finding.line is not None
    assert finding.line.text.endswith("# here")
    assert "there is no scaler" in finding.what
    assert "GradScaler" in finding.remedy.torch


def test_a_scaler_that_is_off_is_named() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        scaler.scale(loss_of(model)).backward()  # here
        scaler.step(optimizer)
        scaler.update()

    (finding,) = watched(step, scaler=torch.amp.GradScaler("cpu", enabled=False)).at("warning")
    assert (finding.code, finding.level) == ("loss-unscaled", "error")
    assert "the scaler is disabled" in finding.what
    assert finding.line is not None
    assert finding.line.text.endswith("# here")


def test_float16_parameters_without_a_scale_are_a_warning() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        model(torch.randn(4, 8).half()).float().square().mean().backward()
        optimizer.step()

    found = [each for each in watched(step, dtype=torch.float16).findings if each.code == "loss-unscaled"]
    assert [each.level for each in found] == ["warning"]


def test_a_part_of_the_loss_that_is_not_scaled_is_found() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        loss = scaler.scale(loss_of(model)) + loss_of(model)
        loss.backward()  # here
        scaler.step(optimizer)
        scaler.update()

    (finding,) = watched(step).at("warning")
    assert (finding.code, finding.level) == ("loss-unscaled", "error")
    assert "a part of the loss" in finding.what


# ---------------------------------------------------------------- a scale on one side only


def test_a_scaler_whose_scale_is_never_called_is_found() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        scaler.scale(torch.zeros(()))
        loss_of(model).backward()
        scaler.step(optimizer)  # here
        scaler.update()

    findings = watched(step).at("error")
    assert codes(findings) == ["loss-unscaled", "never-scaled"]
    assert "256" in findings[1].what
    assert findings[1].line is not None
    assert findings[1].line.text.endswith("# here")


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_with_scaled_gradients_is_found(kind: type[torch.optim.Optimizer]) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        scaler.scale(loss_of(model)).backward()
        optimizer.step()  # here

    (finding,) = watched(step, kind).at("warning")
    assert (finding.code, finding.level) == ("stepped-while-scaled", "error")
    assert "256" in finding.what
    assert finding.line is not None
    assert finding.line.text.endswith("# here")


def test_a_step_with_gradients_scaled_by_hand_is_found() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        (1024 * loss_of(model)).backward()
        optimizer.step()

    (finding,) = watched(step).at("warning")
    assert finding.code == "stepped-while-scaled"
    assert "1,024" in finding.what


@pytest.mark.parametrize("kind", [torch.optim.SGD, lambda params, lr: torch.optim.AdamW(params, lr, fused=True)])
def test_a_loss_that_is_scaled_twice_is_found(kind: type[torch.optim.Optimizer]) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        scaler.scale(scaler.scale(loss_of(model))).backward()
        scaler.step(optimizer)  # here
        scaler.update()

    (finding,) = watched(step, kind, torch.amp.GradScaler("cpu", init_scale=16.0)).at("warning")
    assert (finding.code, finding.level) == ("stepped-while-scaled", "error")
    assert "16 times too large: their loss was scaled twice" in finding.what
    assert finding.line is not None
    assert finding.line.text.endswith("# here")


@pytest.mark.parametrize("kind", [torch.optim.SGD, lambda params, lr: torch.optim.LBFGS(params, lr, max_iter=2)])
def test_a_closure_that_scales_is_found(kind: type[torch.optim.Optimizer]) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model)
            scaler.scale(loss).backward()
            return loss

        optimizer.step(closure)  # here

    (finding,) = watched(step, kind).at("warning")
    assert (finding.code, finding.level) == ("stepped-while-scaled", "error")
    assert finding.line is not None
    assert finding.line.text.endswith("# here")


@pytest.mark.parametrize(("factor", "level"), [(1.0, "warning"), (2.0**60, "error")])
def test_a_step_by_itself_behind_unscale_is_found(factor: float, level: str) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        (scaler.scale(loss_of(model)) * factor).backward()
        scaler.unscale_(optimizer)
        optimizer.step()  # here
        scaler.update()

    findings = [each for each in watched(step).at("warning") if each.code == "overflow-unchecked"]
    assert [each.level for each in findings] == [level]
    assert findings[0].line is not None
    assert findings[0].line.text.endswith("# here")


# ---------------------------------------------------------------- half parameters, and no use


def in_half(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    dtype = next(model.parameters()).dtype
    scaler.scale(model(torch.randn(4, 8).to(dtype)).float().square().mean()).backward()
    scaler.step(optimizer)  # here
    scaler.update()


def test_float16_parameters_under_a_scaler_are_found_where_torch_raises() -> None:
    findings = watched(in_half, dtype=torch.float16, fails=ValueError).at("error")
    (finding,) = [each for each in findings if each.code == "half-params-under-scaler"]
    assert finding.what == "4 of 4 parameters that train are float16, under a scaler"
    assert finding.module == "0, 1"
    assert finding.line is not None
    assert finding.line.text.endswith("# here")


def test_float16_parameters_are_found_where_torch_was_made_not_to_raise() -> None:
    class Patched(torch.amp.GradScaler):
        def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):  # type: ignore[no-untyped-def]
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)

    findings = watched(in_half, dtype=torch.float16, scaler=Patched("cpu", init_scale=256.0)).at("error")
    assert "half-params-under-scaler" in codes(findings)


def test_bfloat16_parameters_under_a_scaler_are_a_warning() -> None:
    findings = watched(in_half, dtype=torch.bfloat16).at("warning")
    found = [each for each in findings if each.code == "half-params-under-scaler"]
    assert [each.level for each in found] == ["warning"]
    assert "bfloat16" in found[0].what


def test_a_scaler_over_bfloat16_autocast_is_worth_knowing() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        scaler.scale(loss_of(model, torch.bfloat16)).backward()
        scaler.step(optimizer)
        scaler.update()

    report = watched(step)
    assert codes(report.at("warning")) == []
    assert "needless-scaler" in codes(report.findings)


def test_a_scaler_for_cuda_without_cuda_is_off() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        scaler = torch.amp.GradScaler("cuda")
    assert codes(watched(right, scaler=scaler).at("warning")) == ["loss-unscaled"]
