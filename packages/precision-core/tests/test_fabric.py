"""Fabric: what setup, teardown and the small methods return, keep and refuse."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam

from precision_core import MODES, Fabric, HalfPrecision, MixedPrecision, Precision, SingleDeviceStrategy


class Batch(NamedTuple):
    x: Tensor
    ids: Tensor


class Net(nn.Module):
    """Keeps what its forward was given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)
        self.seen: Any = None
        self.tag = "mine"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = (args, kwargs)
        x = args[0] if args else kwargs["x"]
        return self.layer(x) if isinstance(x, Tensor) else x

    def embed(self, x: Tensor) -> Tensor:
        self.seen = self.layer(x)
        return self.seen

    def twice(self, x: Tensor) -> Tensor:
        return self(self(x)) + 1

    @staticmethod
    def double(x: Tensor) -> Tensor:
        return torch.mm(x, x)


def fabric(mode: str = "32-true") -> Fabric:
    return Fabric(accelerator="cpu", precision=mode)


# ---------------------------------------------------------------- setup and teardown


@pytest.mark.parametrize("mode", list(MODES))
def test_setup_returns_the_very_objects_and_keeps_what_they_are(mode: str) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    params, keys, step = list(model.parameters()), list(model.state_dict()), optimizer.step
    result = fabric(mode).setup(model, optimizer)
    assert result[0] is model and result[1] is optimizer and len(result) == 2
    assert type(model) is Net and model.tag == "mine" and list(model.state_dict()) == keys
    assert all(new is old for new, old in zip(model.parameters(), params, strict=True))
    assert optimizer.param_groups[0]["params"] == params and optimizer.step != step
    assert {param.dtype for param in params} == {MODES[mode].params}
    assert (fabric(mode).setup(twin := Net())) is twin
    assert fabric(mode).setup_optimizers(one := SGD(model.parameters())) is one


def test_a_training_flag_and_frozen_parameters_stay() -> None:
    model = Net().eval()
    model.layer.bias.requires_grad_(False)
    fabric("bf16-true").setup(model)
    assert not model.training and [p.requires_grad for p in model.parameters()] == [True, False]


def test_setting_up_twice_is_an_error() -> None:
    model, host = Net(), fabric()
    optimizer = SGD(model.parameters())
    host.setup(model, optimizer)
    for again in (lambda: host.setup(model), lambda: fabric().setup(torch.compile(model, backend="eager"))):
        with pytest.raises(ValueError, match="this Net is set up already"):
            again()
    with pytest.raises(ValueError, match="this SGD is set up already"):
        host.setup_optimizers(optimizer)
    with pytest.raises(ValueError, match="this SGD is set up already"):
        host.setup(Net(), same := SGD([nn.Parameter(torch.ones(1))]), same)


def test_what_is_no_module_or_no_optimizer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected a torch.nn.Module first, got a SGD"):
        fabric().setup(SGD([nn.Parameter(torch.ones(1))]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a torch optimizer, got a list"):
        fabric().setup(Net(), [SGD(Net().parameters())])  # type: ignore[arg-type]


def test_a_refused_optimizer_or_model_leaves_the_other_as_it_was() -> None:
    model = Net()
    with pytest.raises(ValueError, match="LBFGS"):
        fabric("16-mixed").setup(model, LBFGS(model.parameters()))
    half = Net().half()
    optimizer = SGD(half.parameters())
    with pytest.raises(ValueError, match=r"layer.weight \(float16\)"):
        fabric("16-mixed").setup(half, optimizer)
    assert "forward" not in vars(model) and "forward" not in vars(half) and "step" not in vars(optimizer)
    fabric("bf16-mixed").setup(model, LBFGS(model.parameters()))


def test_teardown_gives_plain_objects_back_and_they_can_be_set_up_again() -> None:
    host, model = fabric("bf16-true"), Net()
    optimizer = SGD(model.parameters(), lr=1.0)
    host.setup(model, optimizer)
    host.mark_forward_method(model, "embed")
    host.teardown()
    assert not {"forward", "embed"} & vars(model).keys() and "step" not in vars(optimizer)
    assert model(torch.ones(1, 2, dtype=torch.bfloat16)).dtype is torch.bfloat16  # dtypes stay, outputs are not cast
    host.teardown()
    host.setup(model, optimizer)
    assert model(torch.ones(1, 2)).dtype is torch.float32


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("mode", list(MODES))
def test_inputs_are_kept_in_mixed_modes_and_cast_in_true_ones(mode: str) -> None:
    model = fabric(mode).setup(Net())
    batch = {
        "x": torch.tensor([1001.0, 0.1]),
        "nested": [Batch(torch.tensor([1001.0]), torch.tensor([70_001]))],
        "mask": torch.tensor([True]),
        "id": 7,
    }
    model(batch, scale=torch.tensor(1001.0))
    (given,), kwargs = model.seen
    tensors = [given["x"], given["nested"][0].x, kwargs["scale"]]
    dtype = torch.float32 if MODES[mode].mixed else MODES[mode].params
    assert {tensor.dtype for tensor in tensors} == {dtype}
    exact = 1000.0 if dtype is torch.bfloat16 else 1001.0  # bfloat16 has 8 bits
    assert [tensor.flatten()[0].item() for tensor in tensors] == [exact] * 3
    assert given["nested"][0].ids.item() == 70_001 and given["mask"].dtype is torch.bool and given["id"] == 7
    assert (given is batch) is (dtype is torch.float32)


def test_large_targets_survive_16_mixed() -> None:
    model = fabric("16-mixed").setup(Net())
    model(torch.ones(1, 2), target=torch.tensor(70_000.0))
    assert model.seen[1]["target"].item() == 70_000.0


@pytest.mark.parametrize("mode", list(MODES))
def test_outputs_are_float32_or_float64(mode: str) -> None:
    model = fabric(mode).setup(Net())
    assert model(torch.ones(1, 2)).dtype is MODES[mode].output
    assert model(x=torch.ones(1, 2)).dtype is MODES[mode].output
    assert model({"y": [torch.ones(2)]})["y"][0].dtype is MODES[mode].output
    assert model((torch.tensor([3]),))[0].dtype is torch.int64


@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_a_marked_method_runs_in_the_precision(mode: str) -> None:
    host, model = fabric(mode), Net()
    host.setup(model)
    host.mark_forward_method(model, "embed")
    x = torch.tensor([[0.3, 0.7]])
    output = model.embed(x)
    assert model.seen.dtype is MODES[mode].compute and output.dtype is MODES[mode].output
    assert torch.equal(output, model(x))


def test_a_marked_method_may_call_forward_and_be_static() -> None:
    host, model = fabric("bf16-mixed"), Net()
    host.setup(torch.compile(model, backend="eager"))
    host.mark_forward_method(model, "twice")
    host.mark_forward_method(model, "double")
    x = torch.tensor([[0.3, 0.7]])
    assert torch.equal(model.twice(x), model(model(x)) + 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.double(torch.eye(2) * 0.3), torch.mm(torch.eye(2) * 0.3, torch.eye(2) * 0.3).float())


def test_what_cannot_be_marked_is_an_error() -> None:
    host, model = fabric("bf16-mixed"), Net()
    with pytest.raises(ValueError, match=r"set the model up first with fabric.setup\(model\)"):
        host.mark_forward_method(model, "embed")
    host.setup(model)
    for name in ("nothing", "tag", "layer", 3):
        with pytest.raises(ValueError, match=f"Net has no method {name!r}"):
            host.mark_forward_method(model, name)  # type: ignore[arg-type]
    host.mark_forward_method(model, "embed")
    for name in ("embed", "forward"):
        with pytest.raises(ValueError, match=f"{name!r} is marked already"):
            host.mark_forward_method(model, name)


@pytest.mark.parametrize("mode", list(MODES))
def test_autocast_runs_other_code_in_the_precision(mode: str) -> None:
    x = torch.eye(2, dtype=MODES[mode].params)
    with fabric(mode).autocast():
        assert (x @ x).dtype is MODES[mode].compute
        assert torch.zeros(1).dtype is MODES[mode].params
    assert torch.zeros(1).dtype is torch.float32


# ---------------------------------------------------------------- plugins and strategies


def test_a_plugin_or_a_strategy_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pass MixedPrecision\('16-mixed', device=\"cpu\"\)"):
        Fabric(accelerator="cpu", precision=MixedPrecision())
    with pytest.raises(ValueError, match='strategy "dpp" is unknown: core has auto, single_device'):
        Fabric(accelerator="cpu", strategy="dpp")
    with pytest.raises(ValueError, match=r"Fabric\(accelerator='cpu'\) got a SingleDeviceStrategy on 'meta'"):
        Fabric(accelerator="cpu", strategy=SingleDeviceStrategy("meta"))
    with pytest.raises(ValueError, match="allowed are 64-true"):
        Fabric(accelerator="cpu", precision="17-mixed")


def test_given_objects_are_the_ones_in_use() -> None:
    plugin, strategy = HalfPrecision("bf16-true"), SingleDeviceStrategy("cpu")
    host = Fabric(accelerator="cpu", strategy=strategy, precision=plugin)
    assert host.precision_plugin is plugin and host.strategy is strategy and strategy.precision is plugin
    assert host.device == torch.device("cpu") and (host.global_rank, host.world_size) == (0, 1)
    assert host.is_global_zero and type(fabric().precision_plugin) is Precision


# ---------------------------------------------------------------- the small methods


@pytest.mark.parametrize("mode", list(MODES))
def test_modules_and_tensors_are_made_in_the_dtype(mode: str) -> None:
    host = fabric(mode)
    with host.init_module():
        assert nn.Linear(2, 2).weight.dtype is MODES[mode].params
    with host.init_tensor():
        x = torch.tensor([0.1])
    assert x.dtype is (torch.float32 if MODES[mode].mixed else MODES[mode].params)
    assert x.item() == torch.tensor([0.1], dtype=x.dtype).item()
    meta = Fabric(strategy=SingleDeviceStrategy("meta"))
    with meta.init_module():
        assert nn.Linear(2, 2).weight.device.type == "meta"
    with meta.init_tensor():
        assert torch.ones(1).device.type == "meta"
    assert torch.ones(1).device.type == "cpu" and torch.ones(1).dtype is torch.float32


def test_a_model_without_values_is_refused_with_the_way_out() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"0\.weight, .* and \d more. Load them first with fabric.load_module\("):
        fabric("32-true").setup(model)


def test_launch_print_and_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    host = fabric()
    assert host.launch(lambda given, a, b: (given is host, a + b), 1, b=2) == (True, 3)
    assert host.launch() is None
    host.print("a", 1, sep="-", end="!")
    assert capsys.readouterr().out == "a-1!"
    assert host.last_step_skipped is False
    with host.no_backward_sync(Net()):
        pass


def test_clipping_goes_through_a_compiled_model() -> None:
    host, model = fabric(), Net()
    optimizer = Adam(model.parameters())
    compiled, _ = host.setup(torch.compile(model, backend="eager"), optimizer)
    host.backward(compiled(torch.ones(1, 2)).sum(), model=compiled)
    norm = torch.cat([param.grad.flatten() for param in model.parameters()]).norm()
    assert torch.equal(host.clip_gradients(compiled, max_norm=1e-3), norm)
    assert torch.cat([param.grad.flatten() for param in model.parameters()]).norm().item() == pytest.approx(1e-3, 1e-3)
    with pytest.raises(ValueError, match="got neither"):
        host.clip_gradients(compiled, optimizer)


@pytest.mark.parametrize("mode", ["16-mixed", "bf16-mixed", "16-true", "32-true"])
def test_unscaled_gradients_may_be_clipped_by_torch(mode: str) -> None:
    fabric = Fabric(accelerator="cpu", precision=mode)
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    fabric.backward(model(torch.tensor([[0.75, 1.0]])).sum() / 2)
    for _ in range(2):  # once per step, whoever asks
        fabric.unscale_gradients(optimizer)
    assert model.weight.grad.tolist() == [[0.375, 0.5]]
    nn.utils.clip_grad_norm_(model.parameters(), 0.0625)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach().float(), torch.tensor([[-0.0375, -0.05]]), rtol=1e-3, atol=0)
    optimizer.zero_grad()
    fabric.backward(model(torch.tensor([[1.0, 0.0]])).sum() / 2)  # the next step starts anew
    optimizer.step()
    torch.testing.assert_close(model.weight.detach().float(), torch.tensor([[-0.5375, -0.05]]), rtol=1e-3, atol=0)


# ---------------------------------------------------------------- small methods


def test_repr_says_the_precision_the_strategy_and_the_device() -> None:
    host = fabric("bf16-mixed")
    assert repr(host) == "<Fabric precision='bf16-mixed' strategy='single_device' device='cpu', one process>"
    assert repr(host.precision_plugin) == "<MixedPrecision bf16-mixed>"
    unlaunched = repr(Fabric(accelerator="cpu", devices=2))
    assert unlaunched == "<Fabric precision='32-true' strategy='ddp' device='cpu', 2, not launched>"


def test_to_device_keeps_dtypes_and_moves_a_module_in_place() -> None:
    host = Fabric(strategy=SingleDeviceStrategy("meta"), precision="bf16-true")
    moved = host.to_device({"x": torch.ones(2, dtype=torch.float64), "n": [torch.tensor([3]), "text"]})
    assert (moved["x"].device.type, moved["x"].dtype) == ("meta", torch.float64)
    assert (moved["n"][0].device.type, moved["n"][0].dtype, moved["n"][1]) == ("meta", torch.int64, "text")
    model = Net()
    assert host.to_device(model) is model and model.layer.weight.device.type == "meta"
    assert model.layer.weight.dtype is torch.float32
