"""The step: any optimizer, bit for bit what it does to float32 parameters; and nothing of it is left afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from precision_kahan import KahanPrecision
from torch import Tensor, nn, optim
from torch.optim import SGD, AdamW, Optimizer

from precision_core import Fabric

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, 1e-3, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd-fused": lambda p: optim.SGD(p, 1e-3, momentum=0.9, fused=True),
    "adam-amsgrad": lambda p: optim.Adam(p, 1e-3, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, 1e-3, foreach=False),
    "adamw-foreach": lambda p: optim.AdamW(p, 1e-3, foreach=True),
    "adamw-fused": lambda p: optim.AdamW(p, 1e-3, fused=True),
    "adamw-groups": lambda p: optim.AdamW([{"params": p[:1], "weight_decay": 0.0}, {"params": p[1:], "lr": 1e-4}]),
    "adadelta": lambda p: optim.Adadelta(p, 1e-1),
    "adagrad": lambda p: optim.Adagrad(p, 1e-3),
    "adafactor": lambda p: optim.Adafactor(p, 1e-3),
    "adamax": lambda p: optim.Adamax(p, 1e-3),
    "asgd": lambda p: optim.ASGD(p, 1e-3),
    "muon": lambda p: optim.Muon([each for each in p if each.dim() == 2], 1e-3),
    "nadam": lambda p: optim.NAdam(p, 1e-3),
    "radam": lambda p: optim.RAdam(p, 1e-3),
    "rmsprop": lambda p: optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "rprop": lambda p: optim.Rprop(p, 1e-3),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(6, 5, generator=generator))
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x @ self.matrix)


def prepared(mode: str = "bf16-kahan") -> tuple[KahanPrecision, Net]:
    plugin = KahanPrecision(mode)
    return plugin, plugin.convert_module(Net())


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def rounded(state: dict[str, Any]) -> dict[str, Any]:
    """Returns float32 state after a round trip through bfloat16, single numbers as they are."""
    return {
        key: value.bfloat16().float() if torch.is_tensor(value) and value.dim() else value
        for key, value in state.items()
    }


def split(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (rounded, with what that took), float32."""
    near = wide.detach().bfloat16().float()
    return near, near + (wide.detach() - near).bfloat16().float()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_float32_step_rounded(name: str) -> None:
    plugin, model = prepared()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    plain = Net()  # the same by hand, in float32
    for param in plain.parameters():
        param.data = split(param)[1]
    reference = OPTIMIZERS[name](list(plain.parameters()))
    pairs = list(zip(plain.parameters(), model.parameters(), strict=True))
    for seed in range(6):
        set_gradients(model, seed)
        for mine, theirs in pairs:
            mine.grad = theirs.grad.float()
        plugin.optimizer_step(optimizer, model, None)
        reference.step()
        for mine, theirs in pairs:
            near, mine.data[:] = split(mine)
            assert torch.equal(theirs.float(), near)
            if mine in reference.state:
                reference.state[mine] = rounded(reference.state[mine])
    values = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert all(value.dtype is torch.bfloat16 for value in values if torch.is_tensor(value) and value.dim())
    assert set(optimizer.state) <= set(model.parameters()) and plugin.steps == 6


def test_sparse_gradients() -> None:
    plugin = KahanPrecision()
    values = torch.randn(8, 4).bfloat16().float()  # what is lost of others may move a row to its other neighbour
    model = plugin.convert_module(nn.Embedding.from_pretrained(values, freeze=False, sparse=True))
    optimizer = optim.SparseAdam(model.parameters(), lr=1e-4)
    before = model.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([1, 2])).sum().backward()
        plugin.optimizer_step(optimizer, model, None)
    lost = plugin.state_dict()["compensation"]["0.weight"]
    assert model.weight.grad.is_sparse and torch.equal(model.weight[3:], before[3:]) and lost[1:3].any()


def test_the_parameter_stays_what_others_hold_of_it() -> None:
    plugin, model = prepared()
    optimizer = SGD(model.parameters(), lr=0.1)
    calls: list[torch.dtype] = []
    model.matrix.register_post_accumulate_grad_hook(lambda param: calls.append(param.grad.dtype))
    address, view = model.matrix.data_ptr(), model.matrix.detach()[0]
    for _ in range(2):
        model(torch.ones(2, 6, dtype=torch.bfloat16)).sum().backward()
        gradient = model.matrix.grad
        plugin.optimizer_step(optimizer, model, None)
        assert model.matrix.grad is gradient
    assert calls == [torch.bfloat16, torch.bfloat16] and model.matrix.data_ptr() == address
    assert torch.equal(view, model.matrix[0])


def test_hooks_of_the_optimizer_see_float32() -> None:
    plugin, model = prepared()
    optimizer = AdamW(model.parameters())
    model.matrix.tag = "kept"
    seen: list[Any] = []

    def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        param = optimizer.param_groups[0]["params"][0]
        seen.append((param.dtype, param.grad.dtype, param.tag))

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: optimizer.zero_grad())
    set_gradients(model, 0)
    plugin.optimizer_step(optimizer, model, None)
    assert seen == [(torch.float32, torch.float32, "kept")]
    assert all(param.grad is None for param in model.parameters())


class Failing(AdamW):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        raise ArithmeticError("late")


def test_an_optimizer_that_raises_leaves_all_as_it_was() -> None:
    plugin, model = prepared()
    optimizer = Failing(model.parameters())
    set_gradients(model, 0)
    for param in model.parameters():
        optimizer.state[param] = {"step": torch.tensor(3.0)} | {
            key: torch.ones_like(param) for key in ("exp_avg", "exp_avg_sq")
        }
    kept = [(param, param.detach().clone(), param.grad) for param in model.parameters()]
    state, groups = {param: dict(optimizer.state[param]) for param, *_ in kept}, list(model.parameters())
    plugin_state = plugin.state_dict()
    with pytest.raises(ArithmeticError, match="late"):
        plugin.optimizer_step(optimizer, model, None)
    for param, value, gradient in kept:
        assert param.dtype is torch.bfloat16 and torch.equal(param, value) and param.grad is gradient
        assert optimizer.state[param].keys() == state[param].keys()
        assert all(optimizer.state[param][key] is state[param][key] for key in state[param])
        assert optimizer.state[param]["step"] == 3 and (optimizer.state[param]["exp_avg"] == 1).all()
    assert all(mine is theirs for mine, theirs in zip(optimizer.param_groups[0]["params"], groups, strict=True))
    after = plugin.state_dict()
    assert plugin.steps == 0 and all(
        after["compensation"][name] is lost for name, lost in plugin_state["compensation"].items()
    )


class Remembering(SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.mine = list(self.param_groups[0]["params"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.mine:
            param.sub_(param.grad)


def test_an_optimizer_that_goes_behind_its_groups_is_refused() -> None:
    plugin, model = prepared()
    set_gradients(model, 0)
    with pytest.raises(RuntimeError, match="Remembering wrote to parameters that it holds beside"):
        plugin.optimizer_step(Remembering(model.parameters()), model, None)


def test_none_gradients_and_frozen_parameters_stand_still() -> None:
    plugin, model = prepared()
    optimizer = AdamW(model.parameters(), lr=1e-4, weight_decay=0.5)
    set_gradients(model, 0)
    plugin.optimizer_step(optimizer, model, None)
    weight, lost = model.matrix.detach().clone(), plugin.state_dict()["compensation"]["0.matrix"]
    model.matrix.requires_grad_(False)
    model.matrix.grad = None
    for seed in range(3):
        model.norm.weight.grad = torch.full_like(model.norm.weight, seed + 1.0)
        plugin.optimizer_step(optimizer, model, None)
    assert torch.equal(model.matrix, weight) and plugin.state_dict()["compensation"]["0.matrix"] is lost
    model.matrix.requires_grad_(True)
    set_gradients(model, 9)
    plugin.optimizer_step(optimizer, model, None)
    assert not torch.equal(plugin.state_dict()["compensation"]["0.matrix"], lost)
    assert optimizer.state[model.matrix]["step"] == 2 and optimizer.state[model.norm.weight]["step"] == 5


def test_parameters_added_later_are_compensated() -> None:
    plugin, model = prepared()
    optimizer = SGD(model.parameters(), lr=1e-4)
    model.added = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer.add_param_group({"params": [model.added]})
    set_gradients(model, 0)
    plugin.optimizer_step(optimizer, model, None)
    assert torch.equal(model.added, torch.ones(3)) and plugin.state_dict()["compensation"]["0.added"].any()


@pytest.mark.parametrize("mode", ["bf16-kahan; *norm: 32-true", "bf16-kahan; *norm: params=float32,compute=bfloat16"])
def test_float32_exceptions_train_in_float32(mode: str) -> None:
    fabric = Fabric(accelerator="cpu", precision=KahanPrecision(mode))
    model = Net()
    optimizer = AdamW(model.parameters(), lr=1e-5)
    fabric.setup(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        fabric.backward(model(torch.rand(4, 6)).sum())
        optimizer.step()
    assert model.norm.weight.dtype is torch.float32 and (model.norm.weight - 1).abs().max() < 1e-4
    assert (model.norm.bias != 0).any() and fabric.precision_plugin.mode.startswith("bf16-kahan; *norm: ")
    assert set(fabric.precision_plugin.state_dict()["compensation"]) == {"0.matrix"}


def test_a_closure_runs_once_in_bfloat16() -> None:
    plugin, model = prepared()
    optimizer = SGD(model.parameters(), lr=0.1)
    seen: list[torch.dtype] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6, dtype=torch.bfloat16)).pow(2).sum()
        loss.backward()
        seen.append(optimizer.param_groups[0]["params"][0].dtype)
        return loss

    with torch.no_grad():
        assert plugin.optimizer_step(optimizer, model, closure).item() > 0
    assert seen == [torch.bfloat16] and plugin.steps == 1


class Twice(SGD):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure()
        return super().step(closure)


def test_optimizers_that_evaluate_again_are_refused() -> None:
    plugin, model = prepared()
    before = model.matrix.detach().clone()
    set_gradients(model, 0)
    with pytest.raises(ValueError, match=r"cannot step Twice.* use bf16-true or 32-true"):
        plugin.optimizer_step(Twice(model.parameters(), lr=0.1), model, lambda: torch.zeros(()))
    with pytest.raises(ValueError, match="cannot step LBFGS"):
        plugin.optimizer_step(optim.LBFGS(model.parameters()), model, lambda: torch.zeros(()))
    with pytest.raises(ValueError, match="cannot step LBFGS"):
        Fabric(accelerator="cpu", precision=KahanPrecision()).setup(model, optim.LBFGS(model.parameters()))
    assert torch.equal(model.matrix, before) and plugin.steps == 0


def test_two_optimizers_and_a_step_inside_backward() -> None:
    plugin, model = prepared()
    optimizers = {param: AdamW([param], lr=1e-4) for param in model.parameters()}

    def step(param: nn.Parameter) -> None:
        plugin.optimizer_step(optimizers[param], model, None)
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        model(torch.ones(2, 6, dtype=torch.bfloat16)).pow(2).sum().backward()
    assert plugin.steps == 9 and len(plugin.state_dict()["compensation"]) == 3


class Odd(Tensor):
    pass


def test_parameters_that_are_no_plain_tensors_are_refused() -> None:
    plugin = KahanPrecision()
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16).as_subclass(Odd))
    param.grad = torch.ones(3, dtype=torch.bfloat16).as_subclass(Odd)
    with pytest.raises(ValueError, match="not a Odd: it runs on one device only"):
        plugin.optimizer_step(SGD([param], lr=0.1), None, None)
