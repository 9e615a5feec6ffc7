"""bitsandbytes' kernels on a GPU beside products in float64, and what a CPU has not. Nobody has run these tests yet."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from precision_bnb import BitsandbytesPrecision, products, quantizing
from precision_bnb.packed import Format, Layout
from precision_core import Fabric
from precision_core.testing import needs

pytestmark = needs("cuda")

DEVICE = torch.device("cuda", 0)
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""The relative error of a product that is computed in a dtype, a few of its units."""
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu()
    return float((found - wanted).norm() / wanted.norm())


def layer(mode: str, dtype: torch.dtype, columns: int = 256, rows: int = 128) -> Any:
    """Returns a layer that was quantised on the CPU and moved."""
    model = nn.Sequential(nn.Linear(columns, rows))
    with torch.no_grad():
        model[0].weight.copy_(values(rows, columns))
    plugin = BitsandbytesPrecision(mode, dtype, base="32-true")
    return plugin.convert_module(model)[0].to(DEVICE)


@contextmanager
def waiting(mode: str) -> Iterator[None]:
    """Context in which what waits for the device, as far as torch sees, raises ("error")."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- 4 bits


@pytest.mark.parametrize("tokens", [1, 4, 7, 33, 600, 2000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
def test_4_bit_products(mode: str, dtype: torch.dtype, tokens: int) -> None:
    """bitsandbytes has several kernels for them, by the number of tokens."""
    made = layer(mode, dtype)
    weight = copy.deepcopy(made).cpu().dequantize().double()
    x = values(tokens, 256).to(dtype)
    inputs = x.to(DEVICE).requires_grad_()
    y = made(inputs)
    assert error(y, x.double() @ weight.t() + made.bias.cpu().double()) < ROUNDING[dtype]
    grad = values(tokens, 128).to(dtype)
    y.backward(grad.to(DEVICE))
    assert inputs.grad is not None and error(inputs.grad, grad.double() @ weight) < ROUNDING[dtype]


@pytest.mark.parametrize("columns", [48, 130, 7])
def test_rows_that_are_no_whole_blocks(columns: int) -> None:
    made = layer("nf4", torch.float16, columns)
    weight = copy.deepcopy(made).cpu().dequantize().double()
    x = values(5, columns).half()
    assert error(made(x.to(DEVICE)), x.double() @ weight.t() + made.bias.cpu().double()) < ROUNDING[torch.float16]


# ---------------------------------------------------------------- 8 bits


@pytest.mark.parametrize("columns", [256, 130])  # cuBLAS multiplies int8 where they are a multiple of 4
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_products(dtype: torch.dtype, threshold: float, strided: bool, columns: int) -> None:
    """Exact but for the rounding to int8, in any order in memory; above the threshold nothing is rounded."""
    weight, x, bias = values(128, columns), values(33, columns).to(dtype), values(128).to(dtype)
    x[3, 7] = 20.0
    codes, scales = quantizing.quantize_rows(weight.to(DEVICE))
    rounded = codes.cpu().double() * scales.cpu().double().unsqueeze(1) / 127
    wanted = x.double() @ rounded.t() + bias.double()
    given = x.to(DEVICE)
    if strided:
        given = given.t().contiguous().t()
    found = products.int8_product(given, codes, scales, bias.to(DEVICE), threshold)
    assert found.dtype is dtype and error(found, wanted) < (0.02 if threshold else 0.06)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", ["int8", "nf4", "nf4-dq"])
def test_weights_are_quantised_as_on_a_cpu(mode: str, transposed: bool) -> None:
    weight = values(300, 512)
    given = weight.t().contiguous() if transposed else weight
    format = Format(mode.removesuffix("-dq"), double_quant=mode.endswith("-dq"))
    layout = Layout(format, 300, 512)
    here = quantizing.dequantize(quantizing.quantize(weight, format), layout, torch.float32)
    packed = quantizing.quantize(given, format, transposed=transposed, device=DEVICE)
    assert packed.device.type == "cpu"
    there = quantizing.dequantize(packed, layout, torch.float32)
    assert error(there, here.double()) < 1e-3  # a value between two codes may be rounded either way
    packed = quantizing.quantize(given.to(DEVICE), format, transposed=transposed)
    assert torch.equal(quantizing.dequantize(packed.cpu(), layout, torch.float32), there)


@pytest.mark.parametrize("strided", [False, True])
def test_int8_training(strided: bool) -> None:
    weight, x, grad = values(128, 256).half(), values(33, 256).half(), values(33, 128).half()
    param = nn.Parameter(weight.to(DEVICE))
    inputs, upstream = x.to(DEVICE), grad.to(DEVICE)
    if strided:
        inputs, upstream = (each.t().contiguous().t() for each in (inputs, upstream))
    inputs = inputs.detach().requires_grad_()
    y = products.training_product(inputs, param, None, 0.0, True)
    y.backward(upstream)
    assert inputs.grad is not None and param.grad is not None
    assert error(y, x.double() @ weight.double().t()) < 0.02
    assert error(inputs.grad, grad.double() @ weight.double()) < 0.02
    assert error(param.grad, grad.double().t() @ x.double()) < 2e-3


# ---------------------------------------------------------------- CUDA graphs and waiting


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_a_first_forward_can_be_captured(mode: str) -> None:
    """Its tables are not the graph's: memory that others take in between leaves the results as they are."""
    warm, made = layer("fp4", torch.bfloat16), layer(mode, torch.bfloat16)
    x = values(4, 256).bfloat16().to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            warm(x)  # loads kernels and libraries, and makes other tables
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = made(x)
    taken = [torch.full((1 << n,), 7.0, device=DEVICE) for n in range(4, 24)]
    x.copy_(values(5, 256)[1:].bfloat16())
    graph.replay()
    captured = y.clone()
    with torch.no_grad():
        assert torch.equal(captured, made(x))
    assert len(taken) == 20


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4-dq"])
def test_4_bit_layers_wait_for_nothing(mode: str, training: bool) -> None:
    made = layer(mode, torch.bfloat16).train(training)
    x = values(8, 256).bfloat16().to(DEVICE).requires_grad_()
    made(x).sum().backward()
    with waiting("error"):
        made(x).sum().backward()


def test_int8_waits_to_find_outliers_and_without_a_threshold_for_nothing() -> None:
    """bitsandbytes asks the device whether there are any, once a layer and forward."""
    made = layer("int8", torch.float16).eval()
    x = values(8, 256).half().to(DEVICE)
    with torch.no_grad():
        made(x)
        with waiting("error"), pytest.raises(RuntimeError, match="synchronizing"):
            made(x)
        made.threshold = 0.0
        made(x)
        with waiting("error"):
            made(x)


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_embeddings(mode: str) -> None:
    model = nn.Sequential(nn.Embedding(500, 96))
    here = BitsandbytesPrecision(mode, torch.float32, embeddings=True, base="32-true").convert_module(model)[0]
    ids = torch.randint(0, 500, (4, 50), generator=torch.Generator().manual_seed(0))
    wanted, there = here(ids), copy.deepcopy(here).to(DEVICE)
    ids = ids.to(DEVICE)
    there(ids)
    with waiting("error"):
        found = there(ids)
    assert error(found, wanted.double()) < 1e-6


# ---------------------------------------------------------------- files


def test_a_file_is_quantised_on_the_gpu_a_layer_at_a_time(tmp_path: Path) -> None:
    layers, width = 4, 1024
    torch.manual_seed(0)
    save_file({f"{n}.weight": torch.randn(width, width) for n in range(layers)}, tmp_path / "floats.safetensors")
    fabric = Fabric(accelerator="gpu", devices=1, precision=BitsandbytesPrecision("nf4", torch.bfloat16))
    with fabric.init_module():
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fabric.load_module(tmp_path / "floats.safetensors", model)
    grown = torch.cuda.max_memory_allocated() - before
    assert 4 * width**2 < grown < 4 * 4 * width**2  # the floats of a layer were there, those of all were not
    model = fabric.setup(model)
    x = values(8, width).to(DEVICE)
    assert model(x).device == DEVICE and model(x).isfinite().all()
