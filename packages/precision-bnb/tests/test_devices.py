"""What GPUs need and a CPU does not: operands of their kernels, where values are quantised, when tables are made."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.autograd import _functions as vendors_products
from safetensors.torch import save_file
from torch import Tensor, nn

from precision_bnb import MODES, BitsandbytesPrecision, QuantizedEmbedding, QuantizedLinear, products, quantizing
from precision_bnb.packed import Format
from precision_bnb.views import Views
from precision_core import Fabric


def strided(values: Tensor) -> Tensor:
    """Returns the same values in another order in memory: columns first."""
    return values.t().contiguous().t()


def converted(mode: str, columns: int = 64, rows: int = 48, base: str | None = "32-true") -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, rows))
    return BitsandbytesPrecision(mode, torch.float16, base=base).convert_module(model)[0]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted).norm() / wanted.norm())


# ---------------------------------------------------------------- operands


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_weights_are_quantised_row_by_row(by_pointer: Any, dtype: torch.dtype) -> None:
    """Those of transformers' Conv1D, transposed, were wrong by 140 %."""
    weight = torch.randn(48, 64).to(dtype)
    wanted = quantizing.quantize(weight, Format("int8"))
    wide = torch.cat([weight, weight], 1)
    with by_pointer:
        assert torch.equal(quantizing.quantize(weight.t().contiguous(), Format("int8"), transposed=True), wanted)
        assert torch.equal(quantizing.quantize(wide[:, :64], Format("int8")), wanted)
    assert all(each.is_contiguous() for each in by_pointer.operands("bitsandbytes::"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_inputs_of_int8_products_are_read_row_by_row(by_pointer: Any, threshold: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    codes, scales = quantizing.quantize_rows(torch.randn(48, 64))
    x, bias = torch.randn(32, 64).to(dtype), torch.randn(48).to(dtype)
    wanted = products.int8_product(x, codes, scales, bias, threshold)
    with by_pointer:
        found = products.int8_product(strided(x), codes, scales, torch.stack([bias, bias], 1)[:, 0], threshold)
    assert torch.equal(found, wanted)
    assert all(each.is_contiguous() for each in by_pointer.operands("bitsandbytes::int8"))


def test_int8_training_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, by_pointer: Any) -> None:
    """The input is quantised too, and gradients are those of floats."""
    monkeypatch.setattr(products, "_FLOAT_PRODUCTS", ())
    monkeypatch.setattr(vendors_products, "MatMul8bitFp", vendors_products.MatMul8bitLt)  # what is for GPUs, here
    layer = converted("int8-training").half()
    x, grad = torch.randn(32, 64).half(), torch.randn(32, 48).half()
    inputs = strided(x).requires_grad_()
    with by_pointer:
        y = layer(inputs)
        y.backward(strided(grad))
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    assert error(y, x.double() @ weight.t() + bias) < 0.02
    assert error(inputs.grad, grad.double() @ weight) < 0.01
    assert error(layer.weight.grad, grad.double().t() @ x.double()) < 1e-3
    assert error(layer.bias.grad, grad.double().sum(0)) < 1e-3
    assert all(each.is_contiguous() for each in by_pointer.operands("bitsandbytes::int8"))


def test_there_bitsandbytes_is_wrong(by_pointer: Any) -> None:
    """When this fails, bitsandbytes has been mended."""
    torch.manual_seed(0)
    x, grad, weight = torch.randn(32, 64).half(), torch.randn(32, 48).half(), nn.Parameter(torch.randn(48, 64).half())
    with by_pointer:
        vendors_products.MatMul8bitLt.apply(x, weight, None, None, None).backward(grad)
    assert weight.grad is not None and error(weight.grad, grad.double().t() @ x.double()) > 1


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device is one that layers may compute on: to torch it has no autocast."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("columns", [48, 64, 96, 128])
def test_the_fused_4_bit_kernel_gets_whole_blocks_and_a_contiguous_bias(recorder: Any, columns: int) -> None:
    """Of other rows it warns in each forward, and dequantises them."""
    layer = converted("nf4", columns).to("meta")
    layer.bias = nn.Parameter(torch.empty(48, 2, device="meta", dtype=torch.float16).t()[0])
    with recorder:
        assert layer(torch.empty(2, 3, columns, device="meta")).shape == (2, 3, 48)
    fused = recorder.operands("bitsandbytes::gemm_4bit")
    dequantised = recorder.operands("bitsandbytes::dequantize_4bit")
    assert bool(fused) == (columns % 64 == 0) and bool(dequantised) == (columns % 64 != 0)
    assert all(each.is_contiguous() for each in fused)


# ---------------------------------------------------------------- where values are quantised

META = torch.device("meta")


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_values_are_quantised_on_the_device_that_is_asked_for(elsewhere: Any, mode: str) -> None:
    """In large chunks there, and to the same bits; the result is where the values were."""
    weight = torch.randn(1500, 512)  # three chunks of a CPU's
    format = Format(mode.removesuffix("-dq"), double_quant=mode.endswith("-dq"))
    wanted = quantizing.quantize(weight, format)
    with elsewhere:
        found = quantizing.quantize(weight, format, device=META)
    assert torch.equal(found, wanted) and not found.is_meta
    assert elsewhere.quantised == [weight.numel()] and not elsewhere.here


def test_a_gpus_chunks_are_bounded(elsewhere: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "_CHUNK_ON_GPU", 2**16)
    with elsewhere:
        quantizing.quantize(torch.randn(512, 512), Format("nf4"), device=META)
    assert elsewhere.quantised == [2**16] * 4


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> Fabric:
    """One whose device is the meta device, once its plugin has been made for the CPU."""
    fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision("nf4", torch.float32))
    monkeypatch.setattr(fabric._strategy, "device", META)
    return fabric


def test_a_file_is_quantised_where_the_model_will_live(elsewhere: Any, fabric: Fabric, tmp_path: Path) -> None:
    torch.manual_seed(0)
    floats = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    save_file(floats.state_dict(), tmp_path / "floats.safetensors")
    with fabric.init_module():
        model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    with elsewhere:
        fabric.load_module(tmp_path / "floats.safetensors", model)
    assert (elsewhere.quantised, elsewhere.here) == ([64 * 48, 48 * 64], [])
    for layer, values in zip(model, floats, strict=True):
        assert torch.equal(layer.weight, quantizing.quantize(values.weight, Format("nf4")))
    assert pickle.loads(pickle.dumps(model[0])).quantizes_on is None  # the device may be missing where that is read


def test_a_float_model_is_quantised_where_it_will_live(elsewhere: Any, fabric: Fabric) -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    values = model[0].weight.detach().clone()
    with elsewhere:
        fabric.precision_plugin.convert_module(model)
    assert (elsewhere.quantised, elsewhere.here) == ([64 * 48], [])
    assert torch.equal(model[0].weight, quantizing.quantize(values, Format("nf4")))


# ---------------------------------------------------------------- tables


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Tensor]:
    """The tables that this process has made so far, none."""
    tables: dict[Any, Tensor] = {}
    monkeypatch.setattr(quantizing, "_codes", tables)
    return tables


def assert_no_copies_in_forward(layer: Any, x: Tensor, recorder: Any) -> None:
    x = x.to("meta")
    with recorder:
        layer(x)
    assert not recorder.copies, "it would be captured in a CUDA graph"
    assert recorder.operands("bitsandbytes::gemm_4bit") or recorder.operands("aten::embedding")


@pytest.mark.usefixtures("on_meta", "no_tables")
@pytest.mark.parametrize("way", ["moved", "unpickled", "made there", "taken over by hand"])
def test_tables_are_made_when_a_layer_comes_to_a_device(recorder: Any, way: str, no_tables: dict[Any, Tensor]) -> None:
    """In a forward that is captured in a CUDA graph they would lie in the graph's memory, which others write to."""
    layer = converted("nf4-dq").to("meta")
    saved = pickle.dumps(layer)
    if way != "moved":
        no_tables.clear()
    if way == "unpickled":
        layer = pickle.loads(saved)
    elif way == "made there":
        layer = QuantizedLinear(layer.weight, layer.bias, layer.layout, torch.float16)
    elif way == "taken over by hand":
        BitsandbytesPrecision("nf4-dq", torch.float16).convert_module(nn.Sequential(layer))
    assert_no_copies_in_forward(layer, torch.ones(2, 64), recorder)


def test_tables_are_made_at_setup_for_engines_that_move_weights_themselves(
    recorder: Any, fabric: Fabric, no_tables: dict[Any, Tensor]
) -> None:
    model = nn.Sequential(converted("nf4"))
    no_tables.clear()
    fabric.precision_plugin.convert_module(model)
    x, packed = torch.ones(2, 64, device="meta"), model[0].weight.to("meta")  # as FSDP2 does, by the parameter
    with recorder:
        products.product(x, packed, None, Views(packed, model[0].layout), 0.0, False)
    assert recorder.operands("bitsandbytes::gemm_4bit") and not recorder.copies


@pytest.mark.usefixtures("on_meta", "no_tables")
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_an_embeddings_tables_too(recorder: Any, mode: str) -> None:
    model = nn.Sequential(nn.Embedding(50, 64))
    BitsandbytesPrecision(mode, torch.float16, embeddings=True).convert_module(model)
    assert_no_copies_in_forward(model[0].to("meta"), torch.ones(2, 3, dtype=torch.long), recorder)


# ---------------------------------------------------------------- views that are kept


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_a_second_forward_makes_no_views(recorder: Any, mode: str) -> None:
    """They are half of a layer's own Python."""
    layer, x = converted(mode).to("meta"), torch.empty(1, 64, device="meta", dtype=torch.float16)
    with torch.no_grad():
        layer(x)
        with recorder:
            layer(x)
    assert [call.name for call in recorder.calls if call.name.startswith("aten::slice")] == []
    assert len(recorder.calls) <= 5, [call.name for call in recorder.calls]


def write(layer: QuantizedLinear, other: QuantizedLinear) -> None:
    layer.weight.copy_(other.weight)


def assign(layer: QuantizedLinear, other: QuantizedLinear) -> None:
    layer.weight = nn.Parameter(other.weight.clone(), requires_grad=False)


def assign_data(layer: QuantizedLinear, other: QuantizedLinear) -> None:
    layer.weight.data = other.weight.clone()


def load(layer: QuantizedLinear, other: QuantizedLinear) -> None:
    layer.load_state_dict(other.state_dict(), assign=True)


def gather_again(layer: QuantizedLinear, other: QuantizedLinear) -> None:
    """As FSDP2: the memory is given back, and taken again for the next forward, at whatever address."""
    storage = layer.weight.untyped_storage()
    size = storage.size()
    storage.resize_(0)
    storage.resize_(size)
    layer.weight.copy_(other.weight)


def gather_into_new_memory(layer: QuantizedLinear, other: QuantizedLinear) -> None:
    """The old memory is free, and the new one may have its address."""
    size = layer.weight.untyped_storage().size()
    layer.weight.untyped_storage().resize_(0)
    memory = torch.empty(size, dtype=torch.uint8)
    layer.weight = nn.Parameter(memory.view(other.weight.shape).copy_(other.weight), requires_grad=False)


@pytest.mark.parametrize("change", [write, assign, assign_data, load, gather_again, gather_into_new_memory])
@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_kept_views_show_the_weight_of_now(mode: str, change: Any) -> None:
    layer, x = converted(mode), torch.randn(3, 64)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        values = torch.randn(48, 64)
        other.load_state_dict({"weight": values, "bias": layer.bias})
        before = layer(x)  # keeps views
        change(layer, other)
        assert torch.equal(layer(x), other(x)) and not torch.equal(before, other(x))


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_views_of_an_evaluation_serve_training(mode: str) -> None:
    layer, x = converted(mode, base=None), torch.randn(3, 64, requires_grad=True)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert x.grad is not None and error(x.grad, layer.dequantize().double().sum(0).expand(3, 64)) < 1e-2


def test_views_are_neither_copied_nor_saved_nor_in_the_way_of_free_memory() -> None:
    layer = converted("nf4")
    layer(torch.randn(3, 64))
    assert layer._views is not None and copy.deepcopy(layer)._views is None
    assert pickle.loads(pickle.dumps(layer))._views is None
    BitsandbytesPrecision("nf4").convert_module(nn.Sequential(layer))
    assert layer._views is None


# ---------------------------------------------------------------- embeddings


def embedding(mode: str, width: int, rows: int = 300, block_size: int = 64) -> QuantizedEmbedding:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(rows, width))
    config = replace(MODES[mode], **({} if mode == "int8" else {"block_size": block_size}))
    BitsandbytesPrecision(config, torch.float32, embeddings=True).convert_module(model)
    return model[0]  # type: ignore[return-value]


@pytest.mark.parametrize("width", [64, 48, 7])
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_embeddings_make_no_large_tables(recorder: Any, mode: str, width: int) -> None:
    """Positions in int64 took 8 bytes a value, several times: 2 GB for 8192 tokens of a width of 8192."""
    layer, ids = embedding(mode, width), torch.randint(0, 300, (40, 50))
    with recorder:
        result = layer(ids)
    made = [each for call in recorder.calls for each in call.returned]
    assert max(each.nbytes for each in made) <= result.nbytes * (1 + 1 / width)  # an odd row's bytes are a half more
    wide = [tuple(each.shape) for each in made if each.dtype is torch.int64 and each.numel() >= result.numel()]
    assert wide == []
    assert not any(each.dtype is torch.int64 and each.numel() == 300 for each in made)  # none of the vocabulary


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("width", [64, 48, 30, 7, 1])
@pytest.mark.parametrize("mode", ["nf4", "fp4-dq"])
def test_embeddings_of_any_width_and_block(mode: str, width: int, block_size: int) -> None:
    layer = embedding(mode, width, 301, block_size)
    for ids in (torch.arange(301), torch.tensor(300), torch.randint(0, 301, (3, 4)).int(), torch.empty(0, 2).long()):
        result = layer(ids)
        assert torch.equal(result, layer.dequantize()[ids.long()]) and result.shape == (*ids.shape, width)
