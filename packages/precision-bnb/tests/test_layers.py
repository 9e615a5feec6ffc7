"""Layers beside bitsandbytes' own, bit for bit where those are right; and the traps that only theirs have."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import pickle
import warnings
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn

from precision_bnb import (
    MODES,
    BitsAndBytesConfig,
    BitsandbytesPrecision,
    QuantizedEmbedding,
    QuantizedLinear,
    fast,
    products,
    quantize,
    quantizing,
)
from precision_bnb.views import Views

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
needs_kernel = pytest.mark.skipif(not fast.is_available(), reason="no AVX512-BF16: the fused kernel was not exercised")


def linear(columns: int = 128, rows: int = 64, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(columns, rows)


def ours(layer: nn.Module, mode: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = nn.Sequential(copy.deepcopy(layer))
    BitsandbytesPrecision(mode, dtype, base="32-true", **options).convert_module(model)
    return model[0]


def theirs(layer: nn.Linear, mode: str, dtype: torch.dtype = torch.float32, repacks: bool = False) -> Any:
    """Returns bitsandbytes' own layer, which does not repack itself unless asked to."""
    config, layer = BitsAndBytesConfig.of(mode), copy.deepcopy(layer)
    if config.load_in_4bit:
        options = {"quant_type": config.bnb_4bit_quant_type, "compress_statistics": config.bnb_4bit_use_double_quant}
        new = Linear4bit(layer.in_features, layer.out_features, compute_dtype=dtype, **options)
        new.weight = Params4bit(layer.weight.data, requires_grad=False, module=new, **options)
        new.bias = layer.bias
        new.support_avx512bf16_for_cpu = repacks and fast.is_available()
    else:
        floats = config.llm_int8_has_fp16_weight
        new = Linear8bitLt(
            layer.in_features, layer.out_features, has_fp16_weights=floats, threshold=config.llm_int8_threshold
        )
        new.load_state_dict(layer.state_dict())
    return new.to("cpu")


def inputs(columns: int = 128, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[1, 2, 7] = 9.0  # above the threshold of LLM.int8()
    return x.requires_grad_()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="bitsandbytes")


# In evaluation bitsandbytes has no kernel of int8-training for the CPU; see test_int8_training_evaluates.
COMPARED = [(mode, training) for mode in MODES for training in (True, False) if training or mode != "int8-training"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("mode", "training"), COMPARED)
def test_values_and_gradients_equal_bitsandbytes(mode: str, dtype: torch.dtype, training: bool) -> None:
    layers = ours(linear(), mode, dtype), theirs(linear(), mode, dtype)
    results: list[list[Tensor]] = []
    for layer in layers:
        x = inputs(dtype=torch.float32 if "4" in mode else dtype)
        if mode == "int8-training":
            x = x.detach()[0].requires_grad_()  # theirs trains on two dimensions only
        layer.train(training)
        y = layer(x)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
        weight = [layer.weight.grad] if mode == "int8-training" else []
        results.append([y, x.grad, *weight])
    assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))
    mine, other = (layer.bias.grad.float() for layer in layers)
    assert torch.allclose(mine, other, atol=1e-6 if dtype is torch.float32 else 5e-3)  # theirs is summed in two steps


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(48, 24), (1008, 64), (130, 3), (5, 7), (32, 16)], ids=str)
def test_any_shape_is_right(mode: str, shape: tuple[int, int]) -> None:
    """Against the product with the dequantised weights in float64."""
    layer, x = ours(linear(*shape), mode), inputs(max(8, shape[0]))[..., : shape[0]].detach().requires_grad_()
    weight = (layer.weight if mode == "int8-training" else layer.dequantize()).detach().double()
    y = layer(x)
    y.sum().backward()
    exact = x.double() @ weight.t() + layer.bias.double()
    gradient = weight.sum(0).expand_as(x)
    tolerance = 0.02 if mode == "int8-training" else 1e-6  # there, the weights are yet to be rounded
    assert (y - exact).norm() <= tolerance * exact.norm()
    assert (x.grad - gradient).norm() <= tolerance * gradient.norm()


@pytest.mark.parametrize("mode", MODES)
def test_empty_batches_vectors_and_inference(mode: str) -> None:
    layer = ours(linear(), mode)
    x = inputs().detach().clamp(-3, 3)  # outliers are found in the whole batch
    for training in (True, False):
        layer.train(training)
        assert layer(torch.empty(0, 3, 128)).shape == (0, 3, 64)
        with torch.inference_mode():
            rows = layer(x)
            assert torch.allclose(layer(x[0, 1]), rows[0, 1], atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_results_are_no_views(mode: str, training: bool) -> None:
    """FSDP2 warns of a root that returns one, for an operation in place on it would lose the hook of the backward."""
    layer = ours(linear(), mode).train(training)
    for x in (inputs(), inputs()[0], inputs()[0, 0]):
        y = layer(x)
        assert not y._is_view() and y.shape == (*x.shape[:-1], 64)
        (expected,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        (changed,) = torch.autograd.grad(y.mul_(1).square().sum(), x)
        assert torch.equal(changed, expected)


def test_autocast_decides_the_results_dtype() -> None:
    for mode in MODES:
        layer = ours(linear(), mode, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(inputs()).dtype is torch.bfloat16
        assert layer(inputs()).dtype is torch.float32
    wide = ours(linear(), "nf4", torch.float32)  # asked to compute in float32, it does so under autocast, too
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide(inputs()), wide.float()(inputs()).bfloat16())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [*MODES, pytest.param("fast", marks=needs_kernel)])
def test_inputs_that_torchs_layer_refuses_are_refused(mode: str, training: bool) -> None:
    layer = ours(linear(), _fast("nf4") if mode == "fast" else mode, torch.bfloat16).train(training)
    with torch.no_grad():
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
            with pytest.raises(RuntimeError, match=f"expects floats, and was given {dtype}.*ignore_modules"):
                layer(torch.ones(2, 128, dtype=dtype))
        for shape in [(2, 64), (2, 127), (3, 2, 256), ()]:
            with pytest.raises(RuntimeError, match=r"cannot be multiplied with a weight of \(64, 128\)"):
                layer(torch.ones(shape))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_int8_of_a_single_column(rows: int, threshold: float) -> None:
    """torch's _int_mm on a CPU is wrong for one column."""
    layer = ours(linear(1, rows), {"load_in_8bit": True, "llm_int8_threshold": threshold}).eval()
    x = torch.tensor([[0.5], [-2.0], [7.0], [0.0]])
    exact = x.double() @ layer.dequantize().double().t() + layer.bias.double()
    assert (layer(x) - exact).abs().max() < 0.01 * exact.abs().max()


# ---------------------------------------------------------------- traps


def test_float64_inputs() -> None:
    """bitsandbytes without a compute dtype returns uninitialised memory for them."""
    layer, x = ours(linear(), "nf4"), inputs().detach().double()
    assert layer(x).dtype is torch.float64 and torch.equal(layer(x), layer(x.float()).double())


def test_the_bias_stays_what_it_was() -> None:
    for mode in MODES:
        mine, other = (make(linear(), mode, torch.bfloat16) for make in (ours, theirs))
        bias = mine.bias.data
        mine(inputs())
        other(inputs().bfloat16())
        assert mine.bias.data.data_ptr() == bias.data_ptr() and mine.bias.dtype is torch.float32
        assert other.bias.dtype is torch.bfloat16


@needs_kernel
def test_evaluation_leaves_the_weights_alone() -> None:
    mine, other = ours(linear(), "nf4-dq"), theirs(linear(), "nf4-dq", repacks=True)
    kept, floats = mine.weight.clone(), mine.dequantize()
    state = {key: value.clone() for key, value in other.state_dict().items()}
    for layer in (mine, other):
        layer.eval()
        with torch.no_grad():
            layer(inputs().detach())
    assert torch.equal(mine.weight, kept) and torch.equal(mine.dequantize(), floats)
    wrong = bitsandbytes.functional.dequantize_4bit(other.weight, other.weight.quant_state)
    assert (wrong - floats).norm() > 0.5 * floats.norm()
    assert any(not torch.equal(value, state[key]) for key, value in other.state_dict().items())
    x = inputs()
    mine.train()(x).sum().backward()
    assert x.grad is not None


@needs_kernel
def test_shapes_that_the_fused_kernel_refuses() -> None:
    narrow = linear(96, 40)
    with pytest.raises((AssertionError, RuntimeError)), torch.no_grad():
        theirs(narrow, "nf4", repacks=True).eval()(inputs(96).detach())
    for mode in ("nf4", {**_fast("nf4")}):
        layer = ours(narrow, mode, torch.bfloat16).eval()
        with torch.no_grad():
            assert torch.equal(layer(inputs(96)), ours(narrow, "nf4", torch.bfloat16)(inputs(96)))


def _fast(kind: str, **more: Any) -> dict[str, Any]:
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "fast_inference": True, **more}


@needs_kernel
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_fused_kernel_by_choice(kind: str, double: bool) -> None:
    """Eval, then state_dict, training and dequantisation: bit for bit those of a layer that has never evaluated."""
    config = _fast(kind, bnb_4bit_use_double_quant=double)
    plain = ours(linear(), kind + "-dq" * double, torch.bfloat16)
    layer = ours(linear(), config, torch.bfloat16)
    x = inputs().detach()
    for _ in range(2):
        layer.eval()
        with torch.no_grad():
            y = layer(x)
            assert layer._repacked is not None
            assert torch.equal(y, layer(x)) and (y - plain(x)).norm() < 0.01 * y.norm()
            other = theirs(linear(), kind + "-dq" * double, torch.bfloat16, repacks=True).eval()
            assert torch.equal(y, other(x))
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in layer.state_dict().items())
        assert torch.equal(layer.dequantize(), plain.dequantize())
        gradients = []
        for each in (layer, plain):
            given = inputs()
            each.train()(given).sum().backward()
            gradients.append(given.grad)
        assert layer._repacked is None and torch.equal(*gradients)
    layer.eval()
    with torch.no_grad():
        before = layer(x)
        layer.load_state_dict(ours(linear(seed=1), config, torch.bfloat16).state_dict())
        assert (layer(x) - before).norm() > 0.5 * before.norm()  # no stale copy
        assert pickle.loads(pickle.dumps(layer))._repacked is None and copy.deepcopy(layer)._repacked is None


@needs_kernel
def test_the_fused_kernel_without_rows_and_in_inference_mode() -> None:
    with torch.inference_mode():
        layer, x = ours(linear(), _fast("nf4"), torch.bfloat16).eval(), inputs().detach()
        assert layer.weight.is_inference()
        y, empty = layer(x), layer(x[:0])
        assert layer._repacked is not None and empty.shape == (0, *y.shape[1:])
        assert (y - ours(linear(), "nf4", torch.bfloat16)(x)).norm() < 0.01 * y.norm()


@needs_kernel
@pytest.mark.parametrize("change", ["load", "assign", "move"])
def test_the_repacked_copy_goes_with_the_weights(change: str) -> None:
    layer, other = (ours(linear(seed=seed), _fast("nf4"), torch.bfloat16).eval() for seed in (0, 1))
    x = inputs().detach()
    with torch.no_grad():
        before = layer(x)
        layer.bias.copy_(other.bias)
        if change == "load":
            layer.load_state_dict(other.state_dict())
        elif change == "assign":
            layer.weight = nn.Parameter(other.weight.clone(), requires_grad=False)
        else:
            layer.weight.detach().data.copy_(other.weight)  # leaves no trace
            layer.to("cpu")
        assert torch.equal(layer(x), other(x)) and not torch.equal(layer(x), before)


@pytest.mark.skipif(fast.is_available(), reason="this CPU has the kernel")
def test_the_fused_kernel_is_refused_where_it_is_missing() -> None:
    match = r"fast_inference=True\) needs a CPU with AVX512-BF16, and this one has none: leave it out"
    with pytest.raises(ValueError, match=match):
        BitsandbytesPrecision(_fast("nf4"))
    layer = linear()
    with pytest.raises(ValueError, match=match):
        quantize(nn.Sequential(layer), BitsAndBytesConfig.of(_fast("nf4")), torch.bfloat16)
    assert type(layer) is nn.Linear


@pytest.mark.skipif(fast.is_available(), reason="this CPU has the kernel")
@pytest.mark.parametrize("mode", ["nf4", "fp4-dq"])
def test_a_layer_from_a_cpu_with_the_kernel_is_right_without_it(mode: str) -> None:
    layer, x = ours(linear(), mode, torch.bfloat16).eval(), inputs().detach()
    expected = layer(x)
    layer.fast_inference = True  # as torch.load gives it back
    layer = pickle.loads(pickle.dumps(layer))
    with torch.no_grad():
        assert layer.fast_inference and torch.equal(layer(x), expected)
    assert layer._repacked is None


def as_float64(module: nn.Module) -> nn.Module:
    """Casts integers, too."""
    return module.type(torch.float64)


def test_casts_do_not_touch_packed_weights() -> None:
    for mode in ("nf4", "nf4-dq", "int8", {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}):
        layer = ours(linear(), mode)
        floats = layer.dequantize()
        for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, as_float64, nn.Module.float):
            cast(layer)
            assert torch.equal(layer.dequantize(), floats)
        layer.to("meta")
        assert layer.weight.is_meta and layer.weight.dtype is layer.format.storage


def test_a_cast_of_the_packed_tensor_is_noticed() -> None:
    layer = ours(linear(), {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"})
    layer.weight.data = layer.weight.data.float()
    with pytest.raises(RuntimeError, match="which destroys it"):
        layer(inputs())


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_whole_pickles(mode: str) -> None:
    layer, x = ours(linear(), mode), inputs().detach()
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), expected) and other.weight is not layer.weight
        assert other.weight.requires_grad is (mode == "int8-training")


def test_int8_training_sees_every_step() -> None:
    """bitsandbytes keeps codes while there is a gradient: with zeroed gradients it computes with the first for ever."""
    mine, other = (make(linear(), "int8-training") for make in (ours, theirs))
    moved = []
    for layer in (mine, other):
        x = inputs()[0].detach()
        first = layer.train()(x)
        first.sum().backward()
        with torch.no_grad():
            layer.weight.add_(1.0)
        layer.weight.grad.zero_()
        moved.append((layer(x) - first).abs().max().item())
        layer.eval()
    assert moved[0] > 1 and moved[1] == 0


def test_int8_training_evaluates() -> None:
    mine, inference = (
        ours(linear(), "int8-training").eval(),
        ours(linear(), {"load_in_8bit": True, "llm_int8_threshold": 0.0}),
    )
    x = inputs()
    y = mine(x)
    assert torch.equal(y, inference.eval()(x))
    y.sum().backward()
    assert x.grad is not None and mine.weight.grad is not None


def test_an_input_that_others_keep_is_not_written_to() -> None:
    """int8_vectorwise_quant with a threshold writes to its input and restores it: autograd counts that as a change."""
    layer = ours(linear(), "int8", torch.float16).eval()
    x = inputs(dtype=torch.float16)
    squares = x.tanh().square()
    version = squares._version
    layer(squares)
    assert squares._version == version


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "fp4-dq"])  # of the others test_devices.py speaks
def test_the_calls_that_gpus_get_are_the_same(mode: str) -> None:
    """On a GPU products of whole blocks are bitsandbytes' own. Here they run on the CPU, and give what ours give."""
    layer = ours(linear(), mode)
    results = []
    for vendor in (False, True):
        x = inputs()[0].detach().requires_grad_()
        y = products._vendor_4bit(x, layer.bias, Views(layer.weight, layer.layout)) if vendor else layer(x)
        layer.zero_grad()
        y.square().sum().backward()
        results.append([y, x.grad, layer.bias.grad])
    assert all(torch.allclose(mine, other, rtol=1e-6) for mine, other in zip(*results, strict=True))


# ---------------------------------------------------------------- embeddings


@pytest.mark.parametrize("width", [64, 48, 7])
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "int8"])
def test_embeddings(mode: str, width: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        table = nn.Embedding(50, width, padding_idx=3)
    model = nn.Sequential(table)
    BitsandbytesPrecision(mode, torch.float32, embeddings=True).convert_module(model)
    layer = model[0]
    assert isinstance(layer, QuantizedEmbedding) and isinstance(layer, nn.Embedding) and layer.padding_idx == 3
    ids = torch.randint(0, 50, (4, 9))
    assert torch.equal(layer(ids), layer.dequantize()[ids])
    assert (layer.dequantize() - table.weight).norm() < 0.13 * table.weight.norm()


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_an_embedding_whose_codes_were_cast_says_so(mode: str) -> None:
    model = nn.Sequential(nn.Embedding(50, 64))
    BitsandbytesPrecision(mode, torch.float32, embeddings=True).convert_module(model)
    model[0].weight.data = model[0].weight.data.float()
    with pytest.raises(RuntimeError, match=r"the packed weight of this .*was cast from torch\.uint8 to torch\.float32"):
        model(torch.tensor([1]))


NF4 = {"nf4", "nf4 pairs"}


@pytest.mark.parametrize(("mode", "tables"), [("nf4", NF4), ("nf4-dq", {*NF4, "dynamic"}), ("int8", set())])
def test_tables_of_codes_are_there_before_a_layer_needs_them(
    mode: str, tables: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile could not trace how they are made."""
    model = nn.Sequential(nn.Linear(64, 64))
    BitsandbytesPrecision(mode, torch.float32).convert_module(model)
    monkeypatch.setattr(quantizing, "_codes", {})  # as in a process that unpickles the layer
    pickle.loads(pickle.dumps(model))
    assert {name for name, _ in quantizing._codes} == tables


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_ids_are_torchs(mode: str) -> None:
    model = nn.Sequential(nn.Embedding(300, 7))
    BitsandbytesPrecision(mode, torch.float32, embeddings=True).convert_module(model)
    ids = torch.tensor([[299, 0], [150, 299]], dtype=torch.int32)
    assert torch.equal(model(ids), model[0].dequantize()[ids.long()])
    assert model(ids[:0]).shape == (0, 2, 7) and model(ids[0, 0]).shape == (7,)
    for wrong in (-1, 300):
        with pytest.raises(IndexError, match="index out of range"):
            model(torch.tensor([1, wrong]))
    for dtype in (torch.uint8, torch.int16, torch.float32):
        with pytest.raises(RuntimeError, match="Long, Int"):
            model(torch.ones(2, dtype=dtype))


def test_embeddings_that_write_to_themselves_stay() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 64, max_norm=1.0), "other": nn.Linear(64, 64)})
    plugin = BitsandbytesPrecision("nf4", embeddings=True)
    plugin.convert_module(model)
    assert type(model["table"]) is nn.Embedding and "max_norm" in str(plugin.report)


# ---------------------------------------------------------------- compile


@pytest.mark.parametrize("mode", ["nf4-dq", "int8", "int8-training"])
@pytest.mark.parametrize("comes", ["made", "unpickled"])
def test_compiled_layers_are_the_same(mode: str, comes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = pickle.dumps(ours(linear(), mode))
    monkeypatch.setattr(
        importlib.import_module("precision_bnb.quantizing"), "_codes", {}
    )  # as in a process that has quantised nothing
    layer = pickle.loads(saved) if comes == "unpickled" else ours(linear(), mode)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    given, expected = inputs(), inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, while it traces
        y = compiled(given)
    y.sum().backward()
    x = layer(expected)
    x.sum().backward()
    assert torch.equal(y, x) and torch.equal(given.grad, expected.grad)


def test_the_root_may_be_a_layer() -> None:
    layer = linear()
    surgery = quantize(layer, MODES["nf4"], torch.float32)
    assert isinstance(surgery.module, QuantizedLinear) and surgery.module.bias is layer.bias
