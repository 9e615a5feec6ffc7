"""Engine te with the real library: without a GPU, and where three queries pretend that there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import Fabric, SingleDeviceStrategy
from precision_core.strategies import Group
from precision_te import MXFP8, Block, Current, Delayed, TransformerEnginePrecision, restore
from precision_te.recipes import RECIPES
from precision_te.vendor.engine import TransformerEngine

HOPPER = ("delayed", "current", "block")


def state(te: Any) -> Any:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    return FP8GlobalStateManager.quantization_state


@pytest.mark.usefixtures("te")
def test_without_a_gpu_the_vendors_reason_is_given() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = nn.Sequential(nn.Linear(32, 32))
    reason = r"Transformer Engine needs an NVIDIA GPU: .*NVIDIA.*engine=\"reference\".* \[no-fp8-here\]$"
    with pytest.raises(ValueError, match=reason):
        TransformerEnginePrecision().convert_module(model)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"cannot run under SingleDeviceStrategy on cpu: .*needs an NVIDIA GPU"):
        Fabric(accelerator="cpu", precision="transformer-engine")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_that_the_gpu_cannot_run_is_refused_with_the_vendors_reason(recipe: str) -> None:
    plugin = TransformerEnginePrecision(recipe=recipe)
    if recipe in HOPPER:
        assert isinstance(plugin.convert_module(nn.Sequential(nn.Linear(32, 32))), nn.Sequential)
        return
    reason = rf"recipe \"{recipe}\" on this GPU: Device compute capability 10.0 or higher required for {recipe.upper()}"
    with pytest.raises(ValueError, match=reason):
        plugin.convert_module(nn.Sequential(nn.Linear(32, 32)))
    refusal = plugin.refuses(SingleDeviceStrategy())
    assert refusal is not None and "compute capability 10.0" in refusal


def test_an_old_gpu_runs_no_recipe(pretend: Callable[[tuple[int, int]], None]) -> None:
    pretend((8, 0))
    for recipe in RECIPES:
        with pytest.raises(ValueError, match="ompute capability"):
            TransformerEngine().check(TransformerEnginePrecision(recipe=recipe).recipe)


@pytest.mark.usefixtures("blackwell")
def test_under_a_strategy_on_another_device_it_is_refused() -> None:
    refusal = TransformerEnginePrecision("bf16-mixed").refuses(SingleDeviceStrategy())
    assert refusal is not None and "not on 'cpu'" in refusal and "-reference" in refusal


# ---------------------------------------------------------------- contexts


@pytest.mark.usefixtures("blackwell")
@pytest.mark.parametrize("recipe", RECIPES)
def test_contexts_are_entered_with_the_recipe_and_left(te: Any, recipe: str) -> None:
    plugin, vendor = TransformerEnginePrecision("32-true", recipe=recipe), state(te)
    for _ in range(2):
        with torch.no_grad(), plugin.forward_context():
            assert vendor.fp8_enabled and not vendor.fp8_calibration and vendor.autocast_depth == 1
            assert vendor.fp8_recipe is plugin.setup_fp8_recipe() and vendor.fp8_distributed_group is None
        assert not vendor.fp8_enabled and vendor.autocast_depth == 0
    with torch.no_grad(), plugin.calibrating(), plugin.forward_context():
        assert vendor.fp8_calibration and not vendor.fp8_enabled
    with torch.no_grad(), plugin.forward_context():
        assert vendor.fp8_enabled and not vendor.fp8_calibration
    with pytest.raises(KeyError), torch.no_grad(), plugin.forward_context():
        raise KeyError
    assert not vendor.fp8_enabled and vendor.autocast_depth == 0


@pytest.mark.usefixtures("hopper")
def test_a_context_that_the_gpu_refuses_changes_nothing(te: Any) -> None:
    """The vendor's own, refused, stays half entered."""
    plugin, vendor = TransformerEnginePrecision("bf16-mixed", recipe="mxfp8"), state(te)
    for _ in range(2):
        with pytest.raises(ValueError, match="compute capability 10"), plugin.forward_context():
            pass
    assert vendor.autocast_depth == 0 and not vendor.fp8_enabled and not torch.is_autocast_enabled("cuda")


@pytest.mark.usefixtures("hopper")
def test_the_base_modes_autocast_is_around_the_vendors(te: Any) -> None:
    with torch.no_grad(), TransformerEnginePrecision("16-mixed").forward_context():
        assert state(te).fp8_enabled
        assert torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") is torch.float16
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.usefixtures("hopper")
def test_the_vendors_own_recipe_is_used_as_it_is(te: Any) -> None:
    from transformer_engine.common.recipe import DelayedScaling

    mine = DelayedScaling(fp8_dpa=True, amax_history_len=3)
    plugin = TransformerEnginePrecision("32-true", recipe=mine)
    assert plugin.recipe == Delayed(amax_history_len=3)
    with torch.no_grad(), plugin.forward_context():
        assert state(te).fp8_recipe is mine


@pytest.mark.usefixtures("hopper")
def test_amax_is_reduced_over_the_strategys_processes(te: Any, tmp_path: Any) -> None:
    """In a group of one process: who is in it, not what comes of it, which takes kernels."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        plugin = TransformerEnginePrecision("32-true")
        with torch.no_grad(), plugin.forward_context():
            assert state(te).fp8_distributed_group is dist.group.WORLD

        for world_size, group in ((2, dist.group.WORLD), (1, None)):
            plugin = TransformerEnginePrecision("32-true")
            strategy = SingleDeviceStrategy("cuda")
            strategy.group = Group()
            strategy.group.world_size = world_size
            plugin.connect(strategy)
            with torch.no_grad(), plugin.forward_context():
                assert state(te).fp8_distributed_group is group
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- what reaches the quantisers


@pytest.mark.usefixtures("blackwell")
def test_settings_of_a_recipe_reach_the_vendors_quantisers(te: Any) -> None:
    from transformer_engine.pytorch.quantization import RecipeState

    def quantizers(recipe: Any, mode: str = "forward") -> list[Any]:
        theirs = TransformerEngine().vendor_recipe(recipe)
        made = RecipeState.create(theirs, mode=mode, num_quantizers=3, device=torch.device("cpu"))
        return made.make_quantizers()

    for f32 in (False, True):
        assert all(q.force_pow_2_scales is not f32 for q in quantizers(Block(use_f32_scales=f32)))
        assert all(q.force_pow_2_scales is f32 for q in quantizers(Current(use_power_2_scales=f32)))
    blocks = quantizers(Block(x_block_scaling_dim=2, w_block_scaling_dim=1))
    assert [q.block_scaling_dim for q in blocks[:2]] == [2, 1]
    formats = {q.dtype for q in quantizers(MXFP8(fp8_format="hybrid"), "backward")}
    assert formats == {q.dtype for q in quantizers(Delayed(), "backward")} != {q.dtype for q in quantizers(Delayed())}


@pytest.mark.usefixtures("hopper")
def test_layers_of_the_other_engine_are_refused_until_they_are_put_back() -> None:
    for engine, other in (("te", "reference"), ("reference", "te")):
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        first, second = (TransformerEnginePrecision("bf16-mixed", engine=each) for each in (engine, other))
        first.convert_module(model)
        kinds = [type(layer) for layer in model]
        with pytest.raises(
            ValueError, match=rf'0 is a .*engine="{engine}".*under engine="{other}": put torch\'s layers'
        ):
            second.convert_module(model)
        assert [type(layer) for layer in model] == kinds
        second.convert_module(restore(model))
        assert second.report.notes[0].startswith("2 of 2") and type(model[0]) is not kinds[0]


@pytest.mark.usefixtures("blackwell")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "norm"}, "norm: excluded by 'norm', and it is a TELayerNorm already: put"),
        ({"exclude": "linear"}, "linear: excluded by 'linear', and it is a TEDelayedLinear already: put"),
        ({"keep_first": 1}, "linear: among the first 1 linear layers, which stay, and it is converted already: put"),
        ({"pad": False}, "odd: 30 inputs and 20 outputs: this recipe takes multiples of 16"),
    ],
    ids=str,
)
def test_a_second_set_up_by_whose_rules_the_vendors_layers_stay_is_refused(options: Any, message: str) -> None:
    layers = {"norm": nn.LayerNorm(32), "linear": nn.Linear(32, 32), "odd": nn.Linear(30, 20)}
    model = TransformerEnginePrecision("bf16-mixed", pad=True).convert_module(nn.ModuleDict(layers))
    second = TransformerEnginePrecision("bf16-mixed", **{"pad": True} | options)
    with pytest.raises(ValueError, match=message):
        second.convert_module(model)
    second.convert_module(restore(model))
    TransformerEnginePrecision("bf16-mixed", **{"pad": True} | options).convert_module(model)


@pytest.mark.usefixtures("blackwell")
def test_a_norm_over_several_dimensions_is_no_small_linear_layer() -> None:
    plugin = TransformerEnginePrecision("bf16-mixed")
    plugin.convert_module(nn.ModuleDict({"norm": nn.LayerNorm((4, 32)), "linear": nn.Linear(32, 32)}))
    small = [note for note in plugin.report.notes if "too small to win" in note]
    assert small == ["fewer than 2**20 weights, perhaps too small to win: linear"]
