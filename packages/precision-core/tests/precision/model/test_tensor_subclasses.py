"""Parameters that are tensor subclasses, which torch moves by swapping their contents: set up, cast and trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from precision_core import Fabric

X = torch.linspace(-1, 1, 32).view(4, 8)
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def swaps() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def train(mode: str, model: nn.Module, steps: int = 3) -> tuple[nn.Module, list[float]]:
    """Returns the losses of a few steps of an optimizer that was made before the model was set up."""
    fabric = Fabric(accelerator="cpu", precision=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = fabric.setup(model, optimizer)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(X).square().mean()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=10.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.usefixtures("group")
def test_parameters_of_tensor_parallelism(mode: str) -> None:
    _, expected = train(mode, net())
    model = net()
    parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    model, losses = train(mode, model)
    assert type(model[0].weight) is nn.Parameter or isinstance(model[0].weight, DTensor)
    assert isinstance(model[0].weight.data, DTensor)
    assert model[0].weight.dtype is model[0].weight.to_local().dtype is DTYPES[mode]
    assert losses == pytest.approx(expected, rel=1e-3 if "bf16" in mode else 1e-6) and losses[2] < losses[0]


@pytest.mark.parametrize("mode", DTYPES)
def test_under_torchs_swap_flag(mode: str, request: pytest.FixtureRequest) -> None:
    _, expected = train(mode, net())
    request.getfixturevalue("swaps")
    model = net()
    weight = model[0].weight
    model, losses = train(mode, model)
    assert model[0].weight is weight and weight.dtype is DTYPES[mode] and losses == expected


class OneDtype(Tensor):
    """As torchao's packed weights: bytes and a scale, whose one dtype `to` does not change."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> OneDtype:
        made: OneDtype = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)  # type: ignore[attr-defined]
        made.codes, made.scale = codes, scale  # type: ignore[attr-defined]
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> OneDtype:
        return OneDtype(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            return cls(args[0].codes, args[0].scale)
        plain = [arg.codes * arg.scale if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["32-true", "bf16-true", "16-true", "64-true"])
def test_packed_weights_stay_and_are_named(mode: str) -> None:
    model, exact = net(), net().double()
    codes = (torch.arange(64).view(8, 8) % 15 - 7).to(torch.int8)
    model[0].weight = nn.Parameter(OneDtype(codes, torch.tensor(0.1)), requires_grad=False)
    exact[0].weight.data = codes.double() * 0.1
    fabric = Fabric(accelerator="cpu", precision=mode)
    model = fabric.setup(model)
    assert isinstance(model[0].weight.data, OneDtype) and torch.equal(model[0].weight.codes, codes)
    stays = mode in ("bf16-true", "16-true", "64-true")
    report = {"0.weight": "OneDtype has one dtype, float32"} if stays else {}
    assert dict(fabric.precision_plugin.report.skipped) == report
    output = model(X)
    assert (output - exact(X.double())).abs().max() < (0.02 if "16" in mode else 1e-5)
    assert output.dtype is (torch.float64 if mode == "64-true" else torch.float32)


@pytest.mark.full
@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_weights_that_torchao_has_quantised(config: str, mode: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    quantization.quantize_(model, getattr(quantization, config)(), filter_fn=lambda _, name: name == "0")
    x = torch.linspace(-1, 1, 128).view(2, 64)
    expected = model(x).detach()
    model = Fabric(accelerator="cpu", precision=mode).setup(model)
    assert torch.allclose(model(x).float(), expected, atol=0.05 if "bf16" in mode else 1e-5)
