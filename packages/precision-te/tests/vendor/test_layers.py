"""The vendor's layers with the real library: converted, saved, loaded, put back. Its kernels need a GPU."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD

from precision_core.testing import Problem
from precision_te import Delayed, TransformerEnginePrecision, restore
from precision_te.recipes import RECIPES

pytestmark = [pytest.mark.usefixtures("blackwell"), pytest.mark.filterwarnings("ignore:.*onnx.*")]

STATELESS = [name for name in RECIPES if name != "delayed"]


def plugin(precision: Any = "bf16-mixed", **options: Any) -> TransformerEnginePrecision:
    return TransformerEnginePrecision(precision, **options)


def kinds(model: nn.Module) -> dict[str, int]:
    names = [
        type(layer).__name__ for layer in model.modules() if next(layer.parameters(recurse=False), None) is not None
    ]
    return {name: names.count(name) for name in sorted(set(names))}


# ---------------------------------------------------------------- conversion


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_small_gpt_is_converted_and_put_back(recipe: str) -> None:
    te, model = plugin(recipe=recipe), Problem().model()
    optimizer = SGD(model.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids, text = [id(param) for param in model.parameters()], str(model)
    assert te.convert_module(model) is model
    linear = "TEDelayedLinear" if recipe == "delayed" else "TELinear"
    assert kinds(model) == {"Embedding": 2, linear: 9, "TELayerNorm": 5}
    assert [id(param) for param in model.parameters()] == ids == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert len(te.report.converted) == 14 and te.report.skipped == ()
    assert te.report.notes[0] == f'9 of 9 linear layers compute in recipe "{recipe}"'
    assert "perhaps too small to win: blocks.0.qkv" in te.report.notes[1]
    assert [key for key in model.state_dict() if not key.endswith("_extra_state")] == list(before)
    restore(model)
    assert str(model) == text and list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [id(param) for param in model.parameters()] == ids
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            assert vars(layer).keys() == vars(nn.Linear(1, 1)).keys()
        if isinstance(layer, nn.LayerNorm):
            assert vars(layer).keys() == vars(nn.LayerNorm(1)).keys()


def test_layers_that_the_vendor_cannot_take_are_left_with_the_reason() -> None:
    model = nn.ModuleDict(
        {
            "odd": nn.Linear(32, 30),
            "no_affine": nn.LayerNorm(32, elementwise_affine=False),
            "no_bias": nn.LayerNorm(32, bias=False),
            "image": nn.LayerNorm((4, 32)),
            "rms": nn.RMSNorm(32, eps=1e-6),
            "rms_of_its_dtype": nn.RMSNorm(32),
            "rms_no_affine": nn.RMSNorm(32, eps=1e-6, elementwise_affine=False),
            "wide": nn.Linear(32, 32, dtype=torch.float64),
            "no_linear_bias": nn.Linear(32, 32, bias=False),
        }
    )
    from precision_te.vendor.engine import TransformerEngine

    engine = TransformerEngine()
    reasons = {name: engine.why_not(layer, Delayed()) for name, layer in model.items()}
    assert {name for name, reason in reasons.items() if reason is None} == {"image", "rms", "no_linear_bias"}
    assert reasons["odd"] == "32 inputs and 30 outputs: this recipe takes multiples of 16 (pad=True pads them)"
    assert "no weight and no bias" in str(reasons["no_affine"]) and "no bias" in str(reasons["no_bias"])
    assert "eps=None" in str(reasons["rms_of_its_dtype"]) and "float64" in str(reasons["wide"])
    te = plugin()
    del model["wide"]  # of which the base mode says what is wrong
    te.convert_module(model)
    types = {name: type(layer).__name__ for name, layer in model.items()}
    assert (types["image"], types["rms"], types["no_linear_bias"]) == ("TELayerNorm", "TERMSNorm", "TEDelayedLinear")
    skipped = dict(te.report.skipped)
    assert all(skipped[name] == reason for name, reason in reasons.items() if reason and name != "wide")
    assert model["image"].weight.shape == (4, 32) and model["rms"].eps == 1e-6  # type: ignore[comparison-overlap]
    restore(model)
    assert isinstance(model["image"], nn.LayerNorm) and model["image"].normalized_shape == (4, 32)
    assert isinstance(model["rms"], nn.RMSNorm) and model["rms"].eps == 1e-6
    assert isinstance(model["no_linear_bias"], nn.Linear) and model["no_linear_bias"].bias is None


def test_shapes_are_padded_by_choice() -> None:
    te, model = plugin(recipe="mxfp8", pad=True), nn.Sequential(nn.Linear(30, 50))
    te.convert_module(model)
    layer: Any = model[0]
    assert type(layer).__name__ == "TELinear" and layer.weight.shape == (50, 30)
    weight, bias = layer._get_weight_and_bias_tensors()
    assert weight.shape == (64, 32) and bias.shape == (64,)
    assert torch.equal(weight[:50, :30], layer.weight) and not weight[50:].any() and not weight[:, 30:].any()
    weight.sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(50, 30))


@pytest.mark.parametrize("recipe", ["delayed", "current"])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_vendors_forward_is_told_the_first_microbatch_and_gets_one_padded_weight(
    te: Any, monkeypatch: pytest.MonkeyPatch, recipe: str, fp8: bool
) -> None:
    told, weights = [], []

    def forward(layer: Any, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        layer.fp8 = fp8
        weight, bias = layer._get_weight_and_bias_tensors()
        told.append(is_first_microbatch)
        weights.append(weight.data_ptr())
        return nn.functional.linear(inp, weight, bias)

    monkeypatch.setattr(te.Linear, "forward", forward)  # whose kernels need a GPU
    user, layer = plugin(recipe=recipe, pad=True), nn.Linear(30, 50)
    model = user.convert_module(nn.Sequential(layer))
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for number in range(3):
            with user.accumulation_context(number < 2):
                model(torch.ones(16, 30)).sum().backward()
        optimizer.step()
    assert told == ([True, False, False] if fp8 else [True, True, None]) * 2
    assert len({*weights[:3]}) == len({*weights[3:]}) == 1
    assert torch.equal(layer.weight.grad, torch.full((50, 30), 96.0))  # type: ignore[arg-type]
    assert vars(restore(model)[0]).keys() == vars(nn.Linear(1, 1)).keys()  # type: ignore[index]


def test_meta_flags_ties_hooks() -> None:
    with torch.device("meta"):
        model = Problem().model()
    plugin().convert_module(model)
    assert all(param.is_meta for param in model.parameters()) and kinds(model)["TEDelayedLinear"] == 9
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    model[0].eval().note = "mine"
    calls: list[Any] = []
    model[0].register_forward_pre_hook(lambda layer, args: calls.append(layer))
    plugin().convert_module(model)
    first: Any = model[0]
    assert first.weight is model[1].weight and not first.bias.requires_grad and model[1].bias.requires_grad
    assert not first.training and model[1].training and first.note == "mine" and len(first._forward_pre_hooks) == 1
    restore(model)
    assert model[0].note == "mine" and model[0].weight is model[1].weight and len(model[0]._forward_pre_hooks) == 1


def test_the_users_own_layers_are_kept(te: Any) -> None:
    model = nn.Sequential(te.Linear(32, 32, device="cpu"), nn.Linear(32, 32), te.LayerNorm(32, device="cpu"))
    own = model[0]
    user = plugin(replace_layers=False)
    user.convert_module(model)
    assert model[0] is own and type(model[1]) is nn.Linear and user.report.converted == ()
    assert user.report.notes[0].startswith("1 of 2 linear layers")
    plugin().convert_module(model)
    assert model[0] is own and type(model[1]).__name__ == "TEDelayedLinear"
    values = [own.weight.clone(), own.bias.clone()]
    restore(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, nn.LayerNorm]
    assert torch.equal(model[0].weight, values[0]) and torch.equal(model[0].bias, values[1])
    with pytest.raises(
        ValueError, match="replace_layers=False keeps the engine's layers, and this Sequential has none"
    ):
        plugin(replace_layers=False).convert_module(model)


def test_gamma_around_zero_comes_back_as_torchs(te: Any) -> None:
    model = nn.Sequential(te.LayerNorm(32, zero_centered_gamma=True, device="cpu"))
    with torch.no_grad():
        model[0].weight.normal_()
    gamma = model[0].weight + 1
    assert torch.equal(restore(model)[0].weight, gamma)  # type: ignore[index]


def test_a_model_of_another_recipe_is_refused_until_it_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    plugin(recipe="current").convert_module(model)
    plugin(recipe="current").convert_module(model)
    with pytest.raises(ValueError, match=r'0 was converted for recipe "current", and this plugin has "delayed"'):
        plugin().convert_module(model)
    plugin().convert_module(restore(model))
    assert type(model[0]).__name__ == "TEDelayedLinear"


@pytest.mark.parametrize("precision", ["bf16-true", "16-mixed", "32-true", "bf16-mixed; 1: 32-true"])
def test_parameters_have_the_base_modes_dtype(precision: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    te = plugin(precision)
    te.convert_module(model)
    assert model[0].weight.dtype is te.policy.params
    assert (type(model[1]) is nn.LayerNorm) is (";" in precision)


def test_quantised_weights_are_made_by_the_vendors_context(te: Any) -> None:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    state = FP8GlobalStateManager.quantization_state
    user = plugin(recipe="current", quantized_weights=True)
    with user.module_init_context():
        assert state.fp8_parameters and state.fp8_recipe is user.setup_fp8_recipe()
        layer = te.Linear(32, 32, device="meta")
    assert not state.fp8_parameters and layer.primary_weights_in_fp8
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32))
    user.convert_module(model)
    assert model[0].primary_weights_in_fp8 and model[0].weight.is_meta
    with plugin(recipe="current").module_init_context():
        assert not state.fp8_parameters


def exported(te: Any, model: nn.Module, x: Tensor) -> Tensor:
    """Returns the one forward that the vendor has without a GPU: that of an export, which is not in FP8."""
    for layer in model.modules():
        if hasattr(layer, "fp8_meta"):
            layer.forwarded_at_least_once = True  # which takes a GPU
    with torch.no_grad(), te.onnx_export(True):
        return model(x)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("pad", [False, True])
def test_converted_layers_are_torchs_in_high_precision(te: Any, pad: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16, bias=False))
    x = torch.randn(16, 32)
    expected = model(x)
    plugin("32-true", recipe="current", pad=pad).convert_module(model)
    torch.testing.assert_close(exported(te, model, x), expected, rtol=1e-5, atol=1e-6)
    if pad:
        odd = nn.Sequential(nn.Linear(30, 50))
        expected = odd(x[:3, :30])
        plugin("32-true", recipe="current", pad=True).convert_module(odd)
        torch.testing.assert_close(exported(te, odd, x[:3, :30]), expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- state


def filled(layer: Any, recipe: Delayed, seed: int) -> Any:
    """Gives the layer what its first forward would: the vendor's own state, here on the CPU."""
    from transformer_engine.pytorch.quantization import RecipeState

    from precision_te.vendor.recipes import vendor_recipe

    generator = torch.Generator().manual_seed(seed)
    theirs = vendor_recipe(recipe)
    for key, mode, slots in (("scaling_fwd", "forward", 3), ("scaling_bwd", "backward", 2)):
        made = RecipeState.create(theirs, mode=mode, num_quantizers=slots, device=torch.device("cpu"))
        made.scale.copy_(torch.rand(slots, generator=generator) + 1)
        made.amax_history.copy_(torch.rand(made.amax_history.shape, generator=generator))
        layer.fp8_meta[key] = made
    layer.fp8_meta["recipe"] = theirs
    layer.fp8_meta_tensors_initialized = True
    return layer


RECIPE = Delayed(amax_history_len=4)


def model_of(seed: int | None) -> Any:
    torch.manual_seed(0 if seed is None else seed)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16))
    plugin(recipe=RECIPE).convert_module(model)
    if seed is not None:
        filled(model[1], RECIPE, seed)
    return model


def same_state(one: Any, other: Any) -> bool:
    mine, theirs = one.fp8_meta, other.fp8_meta
    return all(
        torch.equal(mine[key].scale[:used], theirs[key].scale[:used])
        and torch.equal(mine[key].amax_history[:, :used], theirs[key].amax_history[:, :used])
        for key, used in (("scaling_fwd", 2), ("scaling_bwd", 1))
    )


def through_torch_save(state: dict[str, Any], path: Path) -> dict[str, Any]:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def through_safetensors(state: dict[str, Any], path: Path) -> dict[str, Any]:
    save_file(state, path)
    return load_file(path)


@pytest.mark.parametrize("through", [through_torch_save, through_safetensors, lambda state, path: state])
def test_scales_and_history_go_through_a_file(through: Any, tmp_path: Path) -> None:
    model = model_of(1)
    state = model.state_dict()
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias", "1._extra_state"]
    assert state["1._extra_state"].shape == (5, 3) and state["1._extra_state"].dtype is torch.float32
    saved = through(state, tmp_path / "state")
    running = model_of(2)
    assert not same_state(model[1], running[1])
    running.load_state_dict(saved)  # strict
    assert same_state(model[1], running[1]) and torch.equal(model[1].weight, running[1].weight)
    fresh = model_of(None)
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.state_dict()["1._extra_state"], saved["1._extra_state"])  # before its first forward, too
    filled(fresh[1], RECIPE, 3)
    fresh[1]._use_loaded()
    assert same_state(model[1], fresh[1])


def test_a_new_layers_state_is_that_of_no_step() -> None:
    state = model_of(None).state_dict()["1._extra_state"]
    assert torch.equal(state[0], torch.ones(3)) and not state[1:].any() and state.shape == (5, 3)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_scales_and_history_go_through_dcp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fresh = model_of(1), model_of(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # it would copy through the GPU's streams
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "folder", no_dist=True)
    state = {"model": fresh.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "folder", no_dist=True)
    fresh.load_state_dict(state["model"])
    assert all(torch.equal(value, state["model"][key]) for key, value in model.state_dict().items())
    assert torch.equal(fresh.state_dict()["1._extra_state"], model.state_dict()["1._extra_state"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_files_of_torchs_layers_and_of_the_vendors_fit_strictly(te: Any, recipe: str) -> None:
    torch.manual_seed(1)
    floats = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32))
    vendors = nn.Sequential(te.LayerNorm(32, device="cpu"), te.Linear(32, 32, device="cpu"))
    with torch.no_grad():
        vendors[1].bias.normal_()
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32))
    plugin(recipe=recipe).convert_module(model)
    for source in (floats, vendors):
        model.load_state_dict(source.state_dict())
        assert torch.equal(model[1].weight, source[1].weight) and torch.equal(model[1].bias, source[1].bias)
    if recipe != "delayed":
        floats.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"1.weight": model[1].weight})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**model.state_dict(), "1.more": torch.zeros(1)})


def test_the_vendors_pickle_is_refused_as_the_vendor_refuses_it(te: Any) -> None:
    model = model_of(None)
    pickled = torch.frombuffer(bytearray(pickle.dumps({"scale_fwd": torch.ones(3), "recipe": None})), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="Refusing to load pickled Transformer Engine extra state"):
        model.load_state_dict({**model.state_dict(), "1._extra_state": pickled})
    with pytest.raises(ValueError, match=r"\(1 \+ history, 3\), and this is \(7, 2\)"):
        model.load_state_dict({**model.state_dict(), "1._extra_state": torch.zeros(7, 2)})


def test_a_history_of_another_length_is_cut_or_filled() -> None:
    model = model_of(1)
    state = model.state_dict()["1._extra_state"]
    for steps in (2, 6):
        other = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16))
        plugin(recipe=Delayed(amax_history_len=steps)).convert_module(other)
        other.load_state_dict(model.state_dict())
        loaded = other.state_dict()["1._extra_state"]
        common = min(steps, 4) - 1  # behind the scales and the running row; the last row is the newest
        assert len(loaded) == 1 + steps and torch.equal(loaded[:2], state[:2])
        assert torch.equal(loaded[-common:], state[-common:]) and not loaded[2:-common].any()


def test_the_state_is_the_references() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16))
    other = TransformerEnginePrecision("32-true", engine="reference", recipe=RECIPE)
    other._device_type = "cpu"
    other.convert_module(reference)
    with other._engine.context(RECIPE):
        reference(torch.randn(16, 32)).sum().backward()
    state = {key: value.clone() for key, value in reference.state_dict().items()}
    assert state["1._extra_state"].abs().sum() > 3
    model = model_of(2)
    model.load_state_dict(state)
    assert torch.equal(model.state_dict()["1._extra_state"], state["1._extra_state"])
    reference.load_state_dict(model_of(2).state_dict())
    assert not torch.equal(reference.state_dict()["1._extra_state"], state["1._extra_state"])


def test_copies_and_pickles_are_whole() -> None:
    model = model_of(1)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert isinstance(twin[1].weight, Tensor) and twin[1].weight is not model[1].weight
        assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
