"""ReferenceLinear: it is an `nn.Linear` in all but its arithmetic, and its state goes wherever a state goes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from precision_te.recipes import NVFP4, RECIPES, Current, Delayed, recipe_from
from precision_te.reference import ReferenceEngine, ReferenceLinear
from precision_te.reference.region import region

ENGINE = ReferenceEngine()
STEPS = 4
DELAYED = Delayed(amax_history_len=STEPS)


def make(
    inputs: int = 32, outputs: int = 48, *, bias: bool = True, dtype: torch.dtype | None = None
) -> ReferenceLinear:
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    return ReferenceLinear(plain.weight, plain.bias)


def trained(layer: ReferenceLinear, steps: int = 3) -> ReferenceLinear:
    for step in range(steps):
        x = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(step))
        with region(DELAYED):
            layer(x).square().sum().backward()
    return layer


def close(result: Tensor, exact: Tensor) -> bool:
    return bool((result.double() - exact.double()).norm() <= 0.06 * exact.double().norm())


def test_it_is_a_linear_with_the_very_parameters() -> None:
    plain = nn.Linear(32, 48)
    layer = ReferenceLinear(plain.weight, plain.bias)
    assert isinstance(layer, nn.Linear) and layer.weight is plain.weight and layer.bias is plain.bias
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert (layer.in_features, layer.out_features) == (32, 48) and "in_features=32" in repr(layer)
    x = torch.randn(4, 32)
    assert torch.equal(layer(x), plain(x))  # outside of a region


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(32,), (1, 32), (0, 32), (3, 32), (2, 5, 32), (2, 0, 32), (2, 1, 3, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_leading_dimensions(name: str, shape: tuple[int, ...], bias: bool) -> None:
    layer = make(bias=bias)
    x = torch.randn(shape, requires_grad=True)
    recipe = recipe_from(name) if name != "nvfp4" else NVFP4(disable_stochastic_rounding=True)
    with region(recipe):
        y = layer(x)
    assert y.shape == (*shape[:-1], 48) and y.dtype is torch.float32
    y.square().sum().backward()
    assert x.grad.shape == shape and layer.weight.grad.shape == (48, 32)
    if x.numel() and name != "nvfp4":
        assert close(y, F.linear(x, layer.weight, layer.bias))
    if not x.numel():
        assert not layer.weight.grad.any()
    wanted = y.detach().double().reshape(-1, 48).mul(2).sum(0)
    assert layer.bias is None or torch.allclose(layer.bias.grad.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(5, 7), (17, 33), (130, 3), (1, 1)])
@pytest.mark.parametrize("name", RECIPES)
def test_sizes_that_fill_no_block_compute_all_the_same(name: str, sizes: tuple[int, int]) -> None:
    layer = make(*sizes)
    x = torch.randn(9, sizes[0], requires_grad=True)
    for _ in range(2):
        with region(recipe_from(name)):
            y = layer(x)
        y.sum().backward()
    error = (y - F.linear(x, layer.weight, layer.bias)).norm() / F.linear(x, layer.weight, layer.bias).norm()
    assert error < (0.3 if name == "nvfp4" else 0.06)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_returns_what_a_linear_returns(name: str, dtype: torch.dtype) -> None:
    layer, x = make(), torch.randn(8, 32, requires_grad=True)
    with torch.autocast("cpu", dtype), region(recipe_from(name)):
        y = layer(x)
        assert torch.get_autocast_dtype("cpu") is dtype and torch.is_autocast_enabled("cpu")
    assert y.dtype is dtype
    y.float().square().sum().backward()
    assert x.grad.dtype is layer.weight.grad.dtype is torch.float32
    x64 = x.detach().double()
    with torch.autocast("cpu", dtype), region(recipe_from(name)):
        assert layer.double()(x64).dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_true_dtypes(dtype: torch.dtype) -> None:
    layer, x = make(dtype=dtype), torch.randn(8, 32, dtype=dtype)
    with region(Current()):
        y = layer(x)
    assert y.dtype is dtype
    y.sum().backward()
    assert layer.weight.grad.dtype is layer.bias.grad.dtype is dtype


def test_what_a_linear_refuses_is_refused() -> None:
    layer = make()
    with region(Current()):
        with pytest.raises(ValueError, match="does not have 32 columns"):
            layer(torch.randn(2, 31))
        with pytest.raises(ValueError, match="does not have 32 columns"):
            layer(torch.tensor(1.0))
        with pytest.raises(ValueError, match=r"bfloat16 and the weight torch\.float32"):
            layer(torch.randn(2, 32, dtype=torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"the input is torch\.int64"):
            layer(torch.ones(2, 32, dtype=torch.int64))


def test_frozen_weights_and_inputs() -> None:
    first, second = make(32, 32), make(32, 32)
    first.requires_grad_(False)
    for _ in range(2):
        with region(DELAYED):
            second(first(torch.randn(8, 32))).sum().backward()
    assert first.weight.grad is None and second.weight.grad is not None
    assert first.amax.history[:, 2].max() == 0 and second.amax.history[:, 2].max() == 1
    assert first.amax.scale[0] != 1 and first.amax.scale[2] == 1 and second.amax.scale[2] == 57344


def test_one_layer_in_two_places_sees_both() -> None:
    layer = make(32, 32)
    x = torch.randn(8, 32)
    with region(DELAYED):
        y = layer(layer(x) * 100)
    y.sum().backward()
    largest = max(x.abs().max(), (F.linear(x, layer.weight, layer.bias) * 100).abs().max())
    assert layer.amax.history[-1, 0] == pytest.approx(largest.item(), rel=0.1)
    assert (layer.amax.history > 0).sum(0).tolist() == [1, 1, 1]


# ---------------------------------------------------------------- copies and states


def test_copies_are_whole_and_independent() -> None:
    layer = trained(make())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.amax.tensor(), layer.amax.tensor())
        before = layer.amax.tensor()
        trained(other, 1)
        assert torch.equal(layer.amax.tensor(), before) and not torch.equal(other.amax.tensor(), before)


def test_a_state_dict_loads_strictly_both_ways() -> None:
    layer = trained(make())
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "_extra_state"] and state["_extra_state"].shape == (1 + STEPS, 3)
    other = make()
    other.load_state_dict(state)
    assert torch.equal(other.amax.tensor(), layer.amax.tensor())
    trained(other, 1)
    assert torch.equal(state["_extra_state"], layer.amax.tensor())  # the state is a copy
    other = trained(make(), 1)
    before = other.amax.tensor()
    other.load_state_dict({key: state[key] for key in ("weight", "bias")})  # of a layer without state
    assert torch.equal(other.amax.tensor(), before)
    other.load_state_dict({**state, "_extra_state": torch.empty(0, dtype=torch.uint8)})  # the vendor's empty one
    assert torch.equal(other.amax.tensor(), before)
    model = nn.Sequential(make(), nn.ReLU())
    model.load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert torch.equal(model[0].amax.tensor(), layer.amax.tensor())


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(9, dtype=torch.uint8),
        torch.zeros(3),
        torch.zeros(5, 2),
        torch.zeros(5, 3).double(),
        torch.zeros(1, 3),
        3,
    ],
)
def test_a_state_that_is_none_is_refused(wrong: Any) -> None:
    layer = trained(make())
    before = layer.amax.tensor()
    with pytest.raises(RuntimeError, match="_extra_state: the state of delayed scaling is"):
        layer.load_state_dict({**layer.state_dict(), "_extra_state": wrong})
    assert torch.equal(layer.amax.tensor(), before)


def test_the_state_goes_through_safetensors_and_dcp(tmp_path: Path) -> None:
    model = nn.Sequential(trained(make()), nn.GELU(), trained(make(48, 16)))
    states = [model[0].amax.tensor(), model[2].amax.tensor()]
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp")

    def fresh() -> nn.Sequential:
        return nn.Sequential(make(), nn.GELU(), make(48, 16))

    loaded = [safetensors.torch.load_file(tmp_path / "model.safetensors"), torch.load(tmp_path / "model.pt")]
    target = nn.Sequential(trained(make(), 1), nn.GELU(), trained(make(48, 16), 1)).state_dict()
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.load({"model": target}, checkpoint_id=tmp_path / "dcp")
    for state in (*loaded, target):
        other = fresh()
        other.load_state_dict(state)
        assert [torch.equal(other[index].amax.tensor(), mine) for index, mine in zip((0, 2), states, strict=True)]
        assert torch.equal(other[0].amax.tensor(), states[0]) and torch.equal(other[2].amax.tensor(), states[1])


def test_dcp_loads_the_state_into_a_new_model_that_ran_once(tmp_path: Path) -> None:
    model, fresh = nn.Sequential(trained(make())), nn.Sequential(make())
    assert "0._extra_state" not in fresh.state_dict()  # dcp asks for what is there, and setup adds no keys
    with torch.no_grad(), region(DELAYED):
        fresh(torch.randn(1, 32))
    target = fresh.state_dict()
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path)
        dcp.load({"model": target}, checkpoint_id=tmp_path)
    fresh.load_state_dict(target)
    assert torch.equal(fresh[0].amax.tensor(), model[0].amax.tensor())


def test_casts_leave_the_state_in_float32_and_meta_drops_it() -> None:
    layer = trained(make())
    before = layer.amax.tensor()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype is torch.bfloat16 and torch.equal(layer.amax.tensor(), before)
    layer.to("meta")
    assert layer.amax is None and "_extra_state" not in layer.state_dict()


# ---------------------------------------------------------------- forwards that run again, compilation


def _losses(recipe: Any, kind: str) -> tuple[list[float], list[Tensor]]:
    torch.manual_seed(0)
    model = nn.ModuleList(make(32, 32) for _ in range(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def block(x: Tensor) -> Tensor:
        return model[1](F.gelu(model[0](x)))

    losses = []
    for step in range(5):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step)).mul_(step + 1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16), region(recipe):
            y = block(x) if kind == "no" else checkpoint(block, x, use_reentrant=kind == "reentrant")
            loss = model[2](y).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [layer.amax.tensor() if layer.amax else torch.zeros(0) for layer in model]


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", RECIPES)
def test_activation_checkpoints_change_nothing(name: str, kind: str) -> None:
    recipe = recipe_from({"recipe": name, "amax_history_len": STEPS} if name == "delayed" else name)
    if name == "nvfp4":
        recipe = NVFP4(disable_stochastic_rounding=True)
    losses, states = _losses(recipe, "no")
    again, others = _losses(recipe, kind)
    assert losses == again
    assert all(map(torch.equal, states, others))


def test_a_forward_outside_of_a_region_runs_again_as_it_was() -> None:
    layer = trained(make(32, 32))
    x = torch.randn(8, 32, requires_grad=True)
    plain = F.linear(x, layer.weight, layer.bias).tanh()
    again = checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=False)
    assert torch.equal(again, plain)
    (wanted,) = torch.autograd.grad(plain.sum(), x)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], wanted)


def _several(run: Callable[..., Tensor], separate: bool = False) -> list[Tensor]:
    """Returns gradients of a block that runs three times, each with other scales, before backward."""
    layers = [make(32, 32), make(32, 32)]

    def block(x: Tensor) -> Tensor:
        return layers[1](F.gelu(layers[0](x)))

    losses = []
    for size in (1, 1000, 0.01):  # far apart, and the values saturate with the scales of others
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).mul_(size).requires_grad_()
        with region(Delayed(amax_history_len=1)):
            losses.append(run(block, x).square().mean() / size)
    with torch.no_grad():
        block(x)  # outside of a region: it has no part in backward
    for loss in losses if separate else [sum(losses, torch.zeros(()))]:
        loss.backward()
    return [layer.weight.grad for layer in layers]


@pytest.mark.parametrize(("reentrant", "separate"), [(False, False), (False, True), (True, True)])
def test_the_engines_checkpoint_keeps_each_forwards_scales(reentrant: bool, separate: bool) -> None:
    def nested(function: Any, x: Tensor) -> Tensor:
        return ENGINE.checkpoint(lambda x: ENGINE.checkpoint(function, x), x)

    plain = _several(lambda function, x: function(x), separate)
    own = _several(lambda function, x: ENGINE.checkpoint(function, x, use_reentrant=reentrant), separate)
    assert all(map(torch.equal, plain, own))
    assert all(map(torch.equal, plain, _several(nested, separate)))


def test_torchs_checkpoint_refuses_where_it_cannot_tell_the_scales() -> None:
    with pytest.raises(RuntimeError, match=r"cannot tell which .* use the plugin's checkpoint"):
        _several(lambda function, x: checkpoint(function, x, use_reentrant=False))


def test_a_forward_outside_of_a_region_does_not_take_the_pending_ones_away() -> None:
    gradients = []
    for run in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=False)):
        layer = trained(make(32, 32))
        with region(DELAYED):
            y = run(nn.Sequential(layer, nn.Tanh()), torch.ones(8, 32).requires_grad_())
        with torch.no_grad():
            layer(torch.randn(8, 32))
        y.sum().backward()
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)


def test_runs_are_forgotten_with_their_graphs() -> None:
    layer = make(32, 32)
    for _ in range(3):
        with region(DELAYED):
            y = layer(torch.randn(8, 32))
        layer(torch.randn(8, 32))
    assert len(layer._runs) == 1
    y.sum().backward()
    del y
    assert not layer._runs


def test_a_state_made_in_inference_mode_trains() -> None:
    layer = make()
    with torch.inference_mode(), region(DELAYED):
        layer(torch.full((2, 32), 3.0))
    trained(layer)
    assert layer.amax.history[1, 0] >= 3
    with torch.inference_mode(), region(Delayed(amax_history_len=9)):
        layer(torch.randn(2, 32))
    trained(layer)


@pytest.mark.parametrize("name", ["delayed", "mxfp8"])
def test_compiled_models_compute_the_same(name: str) -> None:
    recipe = recipe_from({"recipe": name, "amax_history_len": STEPS} if name == "delayed" else name)
    torch._dynamo.reset()
    eager = nn.Sequential(make(32, 32), nn.ReLU(), make(32, 32))
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, backend="aot_eager")
    for step in range(3):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
        with region(recipe):
            mine, theirs = eager(x), run(x)
        assert torch.equal(mine, theirs)
        mine.square().sum().backward()
        theirs.square().sum().backward()
    for ours, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(ours.grad, other.grad)
    torch._dynamo.reset()
    with region(recipe), pytest.raises(torch._dynamo.exc.Unsupported, match=r"compiler\.disable"):
        torch.compile(eager, backend="aot_eager", fullgraph=True)(x)
