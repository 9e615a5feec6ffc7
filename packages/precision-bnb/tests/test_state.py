"""State: what a quantised model saves comes back bit for bit, by every way; what does not fit is refused."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearFP4, LinearNF4
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from precision_bnb import MODES, BitsandbytesPrecision, QuantizedLinear, dequantize
from precision_core import CheckpointError, Fabric


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(11, 48)
            self.up = nn.Linear(48, 96)
            self.norm = nn.LayerNorm(96)
            self.down = nn.Linear(96, 64, bias=False)
            self.lm_head = nn.Linear(64, 11)
        self.register_buffer("positions", torch.arange(5.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.down(self.norm(self.up(self.embedding(ids))).relu()))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def fabric_for(mode: Any, **options: Any) -> Fabric:
    return Fabric(accelerator="cpu", precision=BitsandbytesPrecision(mode, torch.float32, **options))


def quantized(mode: Any, seed: int = 0, **options: Any) -> Model:
    model = Model(seed)
    fabric_for(mode, **options).setup(model)
    return model


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def assert_same(mine: nn.Module, theirs: nn.Module) -> None:
    state = theirs.state_dict()
    assert mine.state_dict().keys() == state.keys()
    assert all(torch.equal(bits(value), bits(state[key])) for key, value in mine.state_dict().items())
    assert all(value.dtype is state[key].dtype for key, value in mine.state_dict().items())


def through_torch(model: nn.Module, other: nn.Module, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "model.pt")
    other.load_state_dict(torch.load(folder / "model.pt", weights_only=True), strict=True)


def through_assign(model: nn.Module, other: nn.Module, folder: Path) -> None:
    other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True, assign=True)


def through_safetensors(model: nn.Module, other: nn.Module, folder: Path) -> None:
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    other.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"), strict=True)


def through_module_files(model: nn.Module, other: nn.Module, folder: Path) -> None:
    fabric = Fabric(accelerator="cpu")
    fabric.save_module(folder, model, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    fabric.load_module(folder, other)


def through_fabric(model: nn.Module, other: nn.Module, folder: Path) -> None:
    fabric = Fabric(accelerator="cpu")
    fabric.save(folder / "model.ckpt", {"model": model})
    fabric.load(folder / "model.ckpt", {"model": other})


def through_dcp(model: nn.Module, other: nn.Module, folder: Path) -> None:
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "dcp", no_dist=True)
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
    other.load_state_dict(state["model"])


WAYS = [through_torch, through_assign, through_safetensors, through_module_files, through_fabric, through_dcp]
STORED = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"}


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")  # of a load without processes
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.removeprefix("through_"))
@pytest.mark.parametrize("mode", [*MODES, STORED], ids=str)
def test_there_and_back(mode: Any, way: Any, tmp_path: Path) -> None:
    model, other = quantized(mode), quantized(mode, seed=1)
    assert not torch.equal(bits(model.up.weight), bits(other.up.weight))
    way(model, other, tmp_path)
    assert_same(other, model)
    assert torch.equal(other(IDS), model(IDS))
    assert other.up.weight.requires_grad is (mode == "int8-training")


def test_the_names_are_the_float_models() -> None:
    for mode in MODES:
        assert list(quantized(mode).state_dict()) == list(Model().state_dict())


# ---------------------------------------------------------------- floats


@pytest.mark.parametrize("mode", MODES)
def test_a_float_checkpoint_is_quantised_as_it_loads(mode: str, tmp_path: Path) -> None:
    fabric, floats, expected = fabric_for(mode), Model(), quantized(mode)
    fabric.save(tmp_path / "floats.ckpt", {"model": floats})
    other = quantized(mode, seed=1)
    fabric.load(tmp_path / "floats.ckpt", {"model": other})
    assert_same(other, expected)
    other = quantized(mode, seed=1)
    other.load_state_dict(floats.state_dict(), strict=True)
    assert_same(other, expected)


@pytest.mark.parametrize(
    ("mode", "embeddings"), [(mode, on) for mode in MODES for on in (False, True)[: 1 + (mode != "int8-training")]]
)
def test_a_model_without_values_is_filled_from_a_file(mode: str, embeddings: bool, tmp_path: Path) -> None:
    fabric = fabric_for(mode, embeddings=embeddings)
    fabric.save_module(tmp_path / "floats", Model(), max_shard_size="10KB")
    with fabric.init_module():
        model = Model()
    assert all(param.is_meta for param in model.parameters()) and not model.positions.is_meta
    fabric.load_module(tmp_path / "floats", model)
    fabric.setup(model)
    report = fabric.precision_plugin.report
    expected = quantized(mode, embeddings=embeddings)
    assert_same(model, expected)
    assert torch.equal(model(IDS), expected(IDS))
    assert [item.name for item in report.converted][-2:] == ["up", "down"]
    assert report.bytes_before == sum(param.nbytes for param in Model().parameters()) + 20
    fabric.save_module(tmp_path / "packed.safetensors", model)  # and a second time, from packed weights
    with fabric.init_module():
        again = Model()
    fabric.load_module(tmp_path / "packed.safetensors", again)
    assert_same(fabric.setup(again), expected)


def test_patterns_hold_for_models_without_values(tmp_path: Path) -> None:
    fabric = fabric_for("nf4", ignore_modules={"up"})
    fabric.save_module(tmp_path / "floats.safetensors", Model())
    with fabric.init_module():
        model = Model()
    fabric.load_module(tmp_path / "floats.safetensors", model)
    assert torch.equal(model.up.weight, Model().up.weight)
    assert isinstance(model.down, QuantizedLinear) and isinstance(model.lm_head, QuantizedLinear)


def test_a_transposed_layer_takes_its_checkpoint() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(64, 64), nn.Sequential(conv1d(96, 64)))
    floats, x = copy.deepcopy(model), torch.randn(2, 3, 64)
    fabric_for("int8").setup(model)
    assert isinstance(model[0], QuantizedLinear) and (model[0].nf, model[1][0].out_features) == (64, 96)
    assert (model(x) - floats(x)).norm() < 0.02 * floats(x).norm()
    packed = copy.deepcopy(model.state_dict())
    model.load_state_dict(floats.state_dict())
    assert all(torch.equal(value, packed[key]) for key, value in model.state_dict().items())


# ---------------------------------------------------------------- bitsandbytes' own


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"])
def test_bitsandbytes_models_and_checkpoints_are_taken_over(mode: str) -> None:
    model, expected = Model(), quantized(mode)
    for name in ("up", "down"):
        layer = getattr(model, name)
        shape = (layer.in_features, layer.out_features, layer.bias is not None)
        new: Any
        if mode == "int8":
            new = Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
        else:
            kind = {"nf4": LinearNF4, "fp4": LinearFP4}[mode[:3]]
            new = kind(*shape, compute_dtype=torch.float32, compress_statistics="dq" in mode)
        new.load_state_dict(layer.state_dict())
        setattr(model, name, new.to("cpu"))
    checkpoint = copy.deepcopy(model.state_dict())
    assert any("absmax" in key or "SCB" in key for key in checkpoint)
    other = quantized(mode, seed=1)
    other.load_state_dict(checkpoint, strict=True)
    assert_same(other, expected)
    fabric_for(mode).setup(model)
    assert_same(model, expected)
    assert torch.equal(model(IDS), expected(IDS))


def test_a_repacked_layer_of_bitsandbytes_is_refused() -> None:
    layer = Linear4bit(64, 64, compute_dtype=torch.float32)
    layer = layer.to("cpu").eval()
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("no AVX512-BF16: bitsandbytes repacks nothing")
    with torch.no_grad():
        layer(torch.randn(2, 64))
    with pytest.raises(ValueError, match="0: bitsandbytes has repacked this layer"):
        fabric_for("fp4").setup(nn.Sequential(layer))


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("saved", "live", "message"),
    [
        ("fp4", "nf4", "weight: fp4 in blocks of 64 in the checkpoint, this layer is nf4 in blocks of 64"),
        ("nf4-dq", "nf4", "nf4-dq in blocks of 64 in the checkpoint, this layer is nf4 in"),
        ("int8", "nf4", "int8 in the checkpoint, this layer is nf4"),
        ("nf4", "int8", "nf4 in blocks of 64 in the checkpoint, this layer is int8"),
        ({"load_in_4bit": True, "block_size": 128}, "fp4", "in blocks of 128 in the checkpoint"),
    ],
)
def test_another_mode_is_refused_by_name(saved: Any, live: str, message: str, tmp_path: Path) -> None:
    fabric, model, other = fabric_for(live), quantized(saved), quantized(live, seed=1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(model.state_dict())
    fabric.save(tmp_path / "model.ckpt", {"model": model})
    other.load_state_dict(before)
    with pytest.raises(CheckpointError, match=message):
        fabric.load(tmp_path / "model.ckpt", {"model": other})
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    fabric.save_module(tmp_path / "model.safetensors", model)
    with pytest.raises(CheckpointError, match=message):
        fabric.load_module(tmp_path / "model.safetensors", other)


def test_packed_weights_are_refused_by_a_float_model(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for up\.weight"):
        Model().load_state_dict(quantized("nf4").state_dict())


def test_shapes_are_compared() -> None:
    layer, other = nn.Sequential(nn.Linear(64, 32)), nn.Sequential(nn.Linear(32, 64))
    plugin = BitsandbytesPrecision("nf4", torch.float32)
    plugin.convert_module(layer)
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(
        RuntimeError, match=r"0.weight: float32 of shape \(64, 32\) in the checkpoint; expected packed nf4"
    ):
        layer.load_state_dict(other.state_dict())
    plugin.convert_module(other)
    with pytest.raises(
        RuntimeError, match=r"packed weights of shape \(64, 32\) in the checkpoint, \(32, 64\) in the layer"
    ):
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer[0].weight, state["0.weight"])


def test_missing_and_unexpected_tensors_are_reported(tmp_path: Path) -> None:
    model = quantized("nf4")
    state = dict(model.state_dict())
    del state["up.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"up.weight\""):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"up.extra\""):
        model.load_state_dict({**model.state_dict(), "up.extra": torch.ones(2)})
    fabric = fabric_for("nf4")
    safetensors.torch.save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"up.weight"):
        fabric.load_module(tmp_path / "part.safetensors", model)
    assert fabric.load_module(tmp_path / "part.safetensors", model, strict=False).missing == ("up.weight",)
    with fabric.init_module():
        empty = Model()
    with pytest.raises(CheckpointError, match=r"up.weight"):
        fabric.load_module(tmp_path / "part.safetensors", empty)


def test_a_file_is_let_go(tmp_path: Path) -> None:
    """Nothing of a loaded model is mapped from the file: overwriting that changes no weight."""
    fabric = fabric_for("nf4")
    for source in (Model(), quantized("nf4")):
        fabric.save_module(tmp_path / "model.safetensors", source)
        with fabric.init_module():
            model = Model()
        fabric.load_module(tmp_path / "model.safetensors", model)
        kept = copy.deepcopy(model.state_dict())
        size = (tmp_path / "model.safetensors").stat().st_size
        with open(tmp_path / "model.safetensors", "r+b") as file:
            file.write(b"\xff" * size)
        assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


# ---------------------------------------------------------------- back to floats


@pytest.mark.parametrize("mode", MODES)
def test_dequantize_puts_float_layers_back(mode: str) -> None:
    quantises = mode != "int8-training"
    model = quantized(mode, embeddings=quantises)
    expected = model(IDS)
    floats = {name: layer.dequantize() for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    fabric = fabric_for(mode)
    plain = dequantize(model)
    assert plain is model and type(model.up) is nn.Linear and type(model.embedding) is nn.Embedding
    assert all(torch.equal(model.get_submodule(name).weight, value) for name, value in floats.items())
    tolerance = 0.05 if mode == "int8-training" else 1e-5
    assert (model(IDS) - expected).norm() <= tolerance * expected.norm()
    assert model.up.weight.requires_grad is not quantises
    with pytest.raises(ValueError, match="has no quantised layer"):
        dequantize(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert fabric.precision_plugin.mode == mode


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "int8"])
def test_dequantize_to_any_floating_dtype(mode: str) -> None:
    """Of float64, bitsandbytes' kernels for 4 bits return memory that nobody wrote."""
    model = quantized(mode, embeddings=True)
    floats = {name: getattr(model, name).dequantize() for name in ("embedding", "up", "down")}
    for dtype in (torch.float64, torch.float8_e4m3fn):
        assert torch.equal(model.up.dequantize(dtype).double(), floats["up"].to(dtype).double())
    for wrong in (torch.int8, torch.complex64, "float32"):
        for call in (model.up.dequantize, lambda dtype: dequantize(model, dtype)):
            with pytest.raises(ValueError, match="dequantize: expected a floating dtype, got"):
                call(wrong)
    assert isinstance(model.up, QuantizedLinear)
    dequantize(model, torch.float64)
    assert all(torch.equal(getattr(model, name).weight, value.double()) for name, value in floats.items())


@pytest.mark.parametrize("mode", ["nf4", "int8-training"])
def test_dequantize_puts_conv1d_back(mode: str) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model, x = nn.Sequential(conv1d(96, 64), nn.Linear(96, 64)), torch.randn(2, 3, 64)
    floats = copy.deepcopy(model)
    fabric_for(mode).setup(model)
    expected = model(x)
    dequantize(model)
    assert type(model[0]) is conv1d and (model[0].nf, model[0].weight.shape) == (96, (64, 96))
    floats.load_state_dict(model.state_dict())
    tolerance = 1e-5 if mode == "nf4" else 0.02  # of the latter, the weights are not rounded
    assert (floats(x) - expected).norm() < tolerance * expected.norm()


# ---------------------------------------------------------------- destroyed, and loaded again


@pytest.mark.parametrize("values", ["packed", "floats"])
def test_a_destroyed_weight_is_loaded_again(values: str) -> None:
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}
    model = quantized(config)
    kept, state = copy.deepcopy(model.state_dict()), Model().state_dict()
    expected = model(IDS)
    model.up.weight.data = model.up.weight.data.float()
    model.down.weight.data = model.down.weight.data[:7]
    with pytest.raises(RuntimeError, match=r"was cast from torch.bfloat16 to torch.float32.*prepare_model_for_kbit"):
        model(IDS)
    with pytest.raises(RuntimeError, match=r"has shape \(7, 1\) in place of"):
        model.down.dequantize()
    model.load_state_dict(kept if values == "packed" else state)
    assert_same(model, quantized(config))
    assert torch.equal(model(IDS), expected)


# ---------------------------------------------------------------- without values


def test_parameters_of_several_modules_stay_one_on_meta() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = nn.Parameter(torch.randn(64, 64), requires_grad=False)
            self.one, self.other = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.one.weight = self.other.weight = shared
            self.lazy = nn.LazyLinear(4)

    with fabric_for("nf4").init_module():
        model = Tied()
    assert model.one.weight is model.other.weight and model.one.weight.is_meta
    assert not model.one.weight.requires_grad
    assert is_lazy(model.lazy.weight)
    assert model.lazy(torch.randn(2, 8)).shape == (2, 4)


def test_packed_weights_have_no_initial_values() -> None:
    model = quantized("nf4", embeddings=True)
    kept = copy.deepcopy(model.state_dict())
    for layer in (model.up, model.embedding):
        with pytest.raises(RuntimeError, match=r"load values first, fabric.load_module\(path, model\)"):
            layer.reset_parameters()
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
