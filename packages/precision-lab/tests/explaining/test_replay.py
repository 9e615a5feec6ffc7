"""A step that is run once more leaves everything as it was; models of many shapes are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import precision_lab
from precision_lab.explaining.replay import Step, run
from precision_lab.explaining.watched import Modules


class Net(nn.Module):
    """Batch norm, dropout, a frozen part, tied weights, a counter in an attribute; several outputs by keyword."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.first.weight
        self.dropout = nn.Dropout(0.2)
        self.calls = 0
        self.checkpointed = checkpointed

    def block(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.first(x))) * self.gain

    def forward(self, x: Tensor, *, gain: float = 1.0) -> dict[str, Any]:
        self.calls += 1
        self.gain = gain
        way = self.checkpointed
        x = self.block(x) if way is None else checkpoint(self.block, x, use_reentrant=way)
        return {"logits": self.tied(self.frozen(x)), "others": (x, {"mean": x.mean()})}


def loss_of(output: dict[str, Any]) -> Tensor:
    logits: Tensor = output["logits"]
    mean: Tensor = output["others"][1]["mean"]
    return logits.square().mean() + mean


def made(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)


@pytest.mark.parametrize("finite", [True, False])
def test_everything_is_as_it_was(finite: bool) -> None:
    model = made()
    fired: list[str] = []
    model.first.weight.register_post_accumulate_grad_hook(lambda param: fired.append("accumulated"))
    x = torch.randn(5, 6)
    loss_of(model(x)).backward()
    fired.clear()
    if not finite:
        with torch.no_grad():
            model.first.weight[0, 0] = torch.inf
    model.dropout.eval()
    buffers = {name: (each, each.clone(), each._version) for name, each in model.named_buffers()}
    params = {name: (each, each.clone(), each._version) for name, each in model.named_parameters()}
    grads = {
        name: (each.grad, None if each.grad is None else each.grad.clone()) for name, (each, _, _) in params.items()
    }
    modes = [module.training for module in model.modules()]
    wants = [param.requires_grad for param in model.parameters()]
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    everywhere = dict(nn.modules.module._global_forward_hooks)
    calls, state, kept = model.calls, torch.get_rng_state(), x.clone()
    found = precision_lab.explain(model, (x,), {"gain": 2.0}, loss=loss_of, rng_state=torch.get_rng_state())
    assert (found.kind == "nothing") is finite and not fired
    for name, each in model.named_buffers():
        assert each is buffers[name][0] and torch.equal(each, buffers[name][1]) and each._version == buffers[name][2]
    for name, each in model.named_parameters():
        before, value, version = params[name]
        assert each is before and torch.equal(each, value) and each._version == version
        gradient, of = grads[name]
        assert each.grad is gradient and (gradient is None or (of is not None and torch.equal(gradient, of)))
    assert modes == [module.training for module in model.modules()]
    assert wants == [param.requires_grad for param in model.parameters()]
    assert hooks == [dict(module._forward_hooks) for module in model.modules()]
    assert everywhere == dict(nn.modules.module._global_forward_hooks)
    assert calls == model.calls and torch.equal(state, torch.get_rng_state()) and torch.equal(x, kept)


@pytest.mark.parametrize("checkpointed", [None, False, True])
def test_a_step_gives_the_gradients_of_the_loop(checkpointed: bool | None) -> None:
    model = made(checkpointed=checkpointed)
    x = torch.randn(5, 6, requires_grad=True)
    state = torch.get_rng_state()
    loss_of(model(x, gain=0.5)).backward()
    step = Step(model, (x,), {"gain": 0.5}, lambda: torch.autocast("cpu", enabled=False), {"cpu": state}, loss=loss_of)
    outcome = run(step, Modules(model))
    assert outcome.finite and set(outcome.gradients) == {"first.weight", "first.bias", "norm.weight", "norm.bias"}
    for name, each in model.named_parameters():
        if each.requires_grad:
            assert each.grad is not None and torch.equal(each.grad, outcome.gradients[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("checkpointed", [None, False, True])
def test_of_several_outputs_each_has_its_gradient(checkpointed: bool | None) -> None:
    model = made(checkpointed=checkpointed)
    x = torch.randn(5, 6, requires_grad=True)
    huge = torch.full((5, 6), 2e38)
    found = precision_lab.explain(model, x, output_gradients=[None, huge, None])
    assert (found.kind, found.phase) == ("overflow in backward", "backward")
    assert found.module == "norm" and found.operation == "native_batch_norm_backward"
    assert precision_lab.explain(model, x, output_gradients=[None, huge * 1e-30, None]).kind == "nothing"


def test_an_error_of_the_model_is_part_of_the_answer() -> None:
    class Strict(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            if not bool(x.isfinite().all()):
                raise ArithmeticError("not finite")
            return x

    model = nn.Sequential(Strict(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    found = precision_lab.explain(model, torch.full((1, 2), 4.0), loss=torch.sum)
    assert (found.module, found.kind, found.reached) == ("0", "overflow in a product", "an error")
    assert "the step ended with ArithmeticError: not finite" in found.notes


def test_a_step_that_cannot_run_is_not_said_to_be_right() -> None:
    found = precision_lab.explain(nn.Linear(3, 1), torch.ones(2, 2), loss=torch.sum)
    assert found.kind == "an error" and "shapes cannot be multiplied" in found.what
