"""SingleDeviceStrategy and the base class: the precision's hooks in order, and state that an optimizer already has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from precision_core import Fabric, Precision, SingleDeviceStrategy, Strategy


class Recording(Precision):
    """A third party's plugin: notes its hooks, and triples the loss for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def connect(self, strategy: Strategy) -> None:
        self.calls.append(("connect", strategy.device.type))

    def convert_module(self, module: nn.Module) -> nn.Module:
        self.calls.append("convert_module")
        return super().convert_module(module)

    def convert_input(self, data: Any) -> Any:
        self.calls.append("convert_input")
        return super().convert_input(data)

    def forward_context(self) -> Any:
        self.calls.append("forward_context")
        return super().forward_context()

    def convert_output(self, data: Any) -> Any:
        self.calls.append("convert_output")
        return super().convert_output(data)

    def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> Tensor:
        self.calls.append(("pre_backward", tensor.item(), module))
        return tensor * 3

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("backward", tensor.item(), kwargs))
        super().backward(tensor, module, *args, **kwargs)

    def post_backward(self, tensor: Tensor, module: nn.Module | None) -> Tensor:
        self.calls.append(("post_backward", tensor.item()))
        return tensor / 3

    def clip_gradients(self, module: nn.Module | None, optimizer: Any = None, **clip: Any) -> Tensor | None:
        self.calls.append(("clip_gradients", module, clip))
        return super().clip_gradients(module, optimizer, **clip)

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
        self.calls.append(("optimizer_step", closure, kwargs))
        return super().optimizer_step(optimizer, model, closure)


def test_a_plugins_hooks_run_in_order_and_their_values_count() -> None:
    plugin, model = Recording(), nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = SGD(model.parameters(), lr=1.0)
    fabric = Fabric(accelerator="cpu", precision=plugin)
    fabric.setup(model, optimizer)
    fabric.backward(model(torch.ones(1, 1)).sum(), model=model, retain_graph=True)
    norm = fabric.clip_gradients(model, optimizer, max_norm=10.0, norm_type=1.0)
    optimizer.step(extra=1)
    clip = {"max_norm": 10.0, "clip_val": None, "norm_type": 1.0, "error_if_nonfinite": False}
    assert plugin.calls == [
        ("connect", "cpu"),
        "convert_module",
        "convert_input",
        "forward_context",
        "convert_output",
        ("pre_backward", 1.0, model),
        ("backward", 3.0, {"retain_graph": True}),
        ("post_backward", 3.0),
        ("clip_gradients", model, clip),
        ("optimizer_step", None, {"extra": 1}),
    ]
    assert norm == 3.0 and model.weight.item() == 1.0 - 3.0


def test_hooks_are_given_the_module_inside_a_compiled_one() -> None:
    plugin, model = Recording(), nn.Linear(1, 1)
    fabric = Fabric(accelerator="cpu", precision=plugin)
    compiled = fabric.setup(torch.compile(model, backend="eager"))
    with fabric.no_backward_sync(compiled):
        fabric.backward(compiled(torch.ones(1, 1)).sum(), model=compiled)
    fabric.clip_gradients(compiled, max_norm=1.0)
    given = [part for call in plugin.calls if type(call) is tuple for part in call if isinstance(part, nn.Module)]
    assert given == [model, model]


def test_it_is_one_process_and_moves_the_module_to_its_device() -> None:
    strategy = SingleDeviceStrategy("meta")
    assert (strategy.group.rank, strategy.group.world_size, strategy.group.is_rank_zero) == (0, 1, True)
    assert strategy.device == torch.device("meta") and SingleDeviceStrategy().device == torch.device("cpu")
    model = nn.Linear(2, 2)
    assert strategy.setup_module(model) is model and model.weight.device.type == "meta"


def connected(device: str) -> Strategy:
    """Returns a strategy as Fabric leaves it: its precision says which dtype state has."""
    strategy = SingleDeviceStrategy(device)
    strategy.connect(Precision())
    return strategy


def stepped(make: Callable[[list[nn.Parameter]], Optimizer], param: nn.Parameter) -> Optimizer:
    optimizer = make([param])
    (param * param.detach()).sum().abs().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_optimizer_state_follows_its_parameter_but_for_the_step_count(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.tensor([0.3, -0.7]))
    optimizer = stepped(lambda params: Adam(params, amsgrad=True), param)
    before = {key: value.clone() for key, value in optimizer.state[param].items()}
    param.data = param.data.to(dtype)
    assert connected("cpu").setup_optimizer(optimizer) is optimizer
    for key, value in optimizer.state[param].items():
        expected = before[key] if key == "step" else before[key].to(dtype)
        assert value.dtype is expected.dtype and torch.equal(value, expected)


def test_complex_state_follows_complex_parameters() -> None:
    param = nn.Parameter(torch.tensor([0.3 + 1j]))
    optimizer = stepped(lambda params: SGD(params, lr=0.1, momentum=0.9), param)
    before = optimizer.state[param]["momentum_buffer"]
    param.data = param.data.to(torch.complex128)
    connected("cpu").setup_optimizer(optimizer)
    after = optimizer.state[param]["momentum_buffer"]
    assert after.dtype is torch.complex128 and torch.equal(after, before.to(torch.complex128))


def test_integer_state_and_state_in_lists() -> None:
    param = nn.Parameter(torch.tensor([0.3, -0.7]))
    optimizer = SGD([param], lr=0.1)
    optimizer.state[param] = {"codes": torch.tensor([250], dtype=torch.uint8), "old": [torch.tensor([0.1]), 7]}
    optimizer.state["all"] = {"seen": 3}  # type: ignore[index]
    param.data = param.data.double()
    connected("cpu").setup_optimizer(optimizer)
    state = optimizer.state[param]
    assert state["codes"].dtype is torch.uint8 and state["old"][0].dtype is torch.float64 and state["old"][1] == 7


@pytest.mark.parametrize(
    ("options", "device"), [({}, "cpu"), ({"fused": True}, "meta"), ({"capturable": True}, "meta")]
)
def test_step_counts_move_where_the_optimizer_counts_on_the_device(options: dict[str, bool], device: str) -> None:
    param = nn.Parameter(torch.ones(1, device="meta"))
    optimizer = Adam([param])
    optimizer.param_groups[0].update(options)
    optimizer.state[param] = {"step": torch.tensor(3.0), "exp_avg": torch.ones(1)}
    connected("meta").setup_optimizer(optimizer)
    state = optimizer.state[param]
    assert (state["step"].device.type, state["exp_avg"].device.type) == (device, "meta")
