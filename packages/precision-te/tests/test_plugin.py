"""The plugin: its modes, base mode, settings and contexts; what it refuses, and in which words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from precision_core import Fabric, MixedPrecision, SingleDeviceStrategy, supports
from precision_core.testing import Net, loss_of, make_batch, run_in_ranks
from precision_te import MODES, Current, Delayed, TransformerEnginePrecision
from precision_te.reference.layers import ReferenceLinear
from precision_te.support import rows

REFERENCES = {mode: options["recipe"] for mode, options in MODES.items() if options["engine"] == "reference"}


def reference(precision: Any = "bf16-mixed", **options: Any) -> TransformerEnginePrecision:
    return TransformerEnginePrecision(precision, engine="reference", **options)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize(("mode", "recipe"), REFERENCES.items())
def test_the_references_modes_are_entry_points_and_train(mode: str, recipe: str) -> None:
    fabric = Fabric(accelerator="cpu", precision=mode)
    plugin: Any = fabric.precision_plugin
    assert isinstance(plugin, TransformerEnginePrecision) and plugin.mode == mode and plugin.engine == "reference"
    assert plugin.recipe.name == recipe and str(plugin.policy) == "bf16-mixed"
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    fabric.setup(model, optimizer)
    assert isinstance(model.blocks[0].up, ReferenceLinear)  # type: ignore[union-attr]
    losses = []
    for step in range(20):  # five batches, four times
        batch, target = make_batch(step % 5)
        optimizer.zero_grad()
        loss = loss_of(model(batch), target)
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_the_bare_mode_is_over_bf16_mixed_and_the_class_over_16_mixed() -> None:
    from precision_core.support import load_plugin

    plugin: Any = load_plugin("transformer-engine")
    assert (plugin.engine, plugin.recipe, str(plugin.policy)) == ("te", Delayed(), "bf16-mixed")
    assert plugin.mode == "transformer-engine"
    assert str(TransformerEnginePrecision().policy) == "16-mixed"


def test_a_mode_takes_exceptions_of_the_base_mode() -> None:
    fabric = Fabric(accelerator="cpu", precision="fp8-reference; head: 32-true")
    assert fabric.precision_plugin.mode == "fp8-reference; head: 32-true"
    model = Net()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    fabric.setup(model)
    assert type(model.head) is nn.Linear and isinstance(model.blocks[0].up, ReferenceLinear)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="bf17"):
        Fabric(accelerator="cpu", precision="fp8-reference; head: bf17")


def test_support_says_what_the_machine_does() -> None:
    table = rows()
    assert {row.mode for row in table} == set(MODES) and len(table) == len({(row.mode, row.device) for row in table})
    for mode in REFERENCES:
        answer = supports(mode, "cpu")
        assert answer and answer.level == "slow" and "nobody" not in answer.reason
    assert not supports("transformer-engine", "cpu") and "NVIDIA" in supports("transformer-engine", "cpu").reason


# ---------------------------------------------------------------- base


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", 16, "bf16-mixed; 0: 32-true"])
def test_base_by_choice(precision: Any) -> None:
    fabric = Fabric(accelerator="cpu", precision=reference(precision, recipe="current"))
    model = fabric.setup(small())
    policy = fabric.precision_plugin.policy
    assert model[2].weight.dtype is policy.params
    x = torch.randn(16, 32, dtype=policy.params)
    output = model(x)
    assert output.dtype is policy.output
    fabric.backward(output.float().square().mean())
    assert (fabric.precision_plugin.scale > 1.0) is (precision == 16)
    assert all(param.grad is not None and param.grad.dtype is policy.params for param in model.parameters())


@pytest.mark.parametrize(
    ("precision", "weights", "fallback", "wanted"),
    [
        ("bf16-mixed", torch.bfloat16, torch.bfloat16, "bf16-true"),
        ("bf16-true", torch.float32, torch.bfloat16, "bf16-mixed"),
        ("32-true", torch.bfloat16, None, "bf16-true"),
        ("32-true", None, "float16", "16-mixed"),
        ("16-mixed", None, torch.bfloat16, "bf16-mixed"),
        ("bf16-mixed", "float32", None, "bf16-mixed"),
    ],
    ids=str,
)
def test_dtypes_of_weights_and_of_the_rest_change_the_base_mode(
    precision: str, weights: Any, fallback: Any, wanted: str
) -> None:
    plugin = reference(precision, weights_dtype=weights, fallback_compute_dtype=fallback, recipe="current")
    assert str(plugin.policy) == wanted
    model = plugin.convert_module(small())
    assert {param.dtype for param in model.parameters()} == {plugin.policy.params}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "is no mode"),
        ({"precision": 8}, "is no mode"),
        ({"engine": "tensorrt"}, r"engine='tensorrt'.*expected one of te, reference"),
        ({"fp8_format": "e3m4"}, "e3m4"),
        ({"recipe": "delay"}, "delay"),
        ({"recipe": {"recipe": "delayed", "amax_history": 4}}, "amax_history"),
        ({"recipe": {"margin": 4}}, "names its recipe"),
        ({"recipe": 3}, "3"),
        ({"weights_dtype": torch.bfloat16}, "mixed precision trains float32 params"),
        ({"weights_dtype": torch.int8}, "int8"),
        ({"fallback_compute_dtype": "float8"}, "float8"),
        ({"keep_first": -1}, r"keep_first=-1"),
        ({"keep_last": 1.5}, r"keep_last=1.5"),
        ({"keep_first": True}, r"keep_first=True"),
        ({"pad": True, "engine": "reference"}, r"pad=True.*engine=\"te\" does that"),
        ({"quantized_weights": True, "engine": "reference"}, r"quantized_weights=True"),
        ({"recipe": Current(), "fp8_format": "e4m3"}, "contradicts"),
        ({"recipe": {"recipe": "delayed", "margin": 2000}}, r"margin=2000.*: expected -112 to 127"),
        ({"exclude": None}, r"exclude=None\): expected name patterns"),
        ({"exclude": 3}, r"exclude=3"),
        ({"exclude": [1]}, "bad name pattern 1"),
        ({"replace_layers": "no"}, r"replace_layers='no'\): expected True or False"),
        ({"replace_layers": None}, r"replace_layers=None"),
        ({"pad": 1}, r"pad=1\): expected True or False"),
        (
            {"precision": "fp8-reference"},
            r'"bf16-mixed", engine="reference", recipe="delayed".*Fabric\(precision=\'fp8-reference',
        ),
        ({"precision": "transformer-engine; head: 32-true"}, r'"bf16-mixed", engine="te"\); by that name it is Fabric'),
    ],
    ids=str,
)
def test_what_is_no_setting_is_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerEnginePrecision(**options)


def test_recipes_and_formats_come_in_every_spelling() -> None:
    assert reference(fp8_format="E4M3").recipe == Delayed(fp8_format="e4m3")
    assert reference(recipe="current", fp8_format="e5m2").recipe == Current(fp8_format="e5m2")
    assert reference(recipe={"recipe": "delayed", "amax_history_len": 4}).recipe == Delayed(amax_history_len=4)
    recipe = Current(use_power_2_scales=True)
    assert reference(recipe=recipe).recipe is recipe


# ---------------------------------------------------------------- the vendor's engine


@pytest.mark.parametrize("recipe", ["delayed", "current", "block", "mxfp8"])
@pytest.mark.parametrize("spelling", ["e5m2", "E5M2"])
def test_pure_e5m2_is_refused_by_engine_te_alone(recipe: str, spelling: str) -> None:
    with pytest.raises(ValueError, match=r"Pure E5M2 training is not supported\. .*engine=\"reference\""):
        TransformerEnginePrecision(fp8_format=spelling, recipe=recipe)
    assert reference(fp8_format=spelling, recipe=recipe).recipe.fp8_format == "e5m2"


@pytest.mark.usefixtures("no_vendor")
def test_without_the_library_engine_te_says_what_to_install() -> None:
    plugin = TransformerEnginePrecision()
    install = r"which is not installed: install torch first.*pip install --no-build-isolation.*transformer-engine\["
    with pytest.raises(
        ImportError, match=rf"setup_fp8_recipe\(\) needs Transformer Engine, {install}.*precision-te\[v"
    ):
        plugin.setup_fp8_recipe()
    model = small()
    with pytest.raises(ImportError, match=install):
        plugin.convert_module(model)
    assert type(model[0]) is nn.Linear
    way_out = r'on this machine precision="fp8-reference", .* in plain torch, slowly \[no-fp8-here\]$'
    for precision in ("transformer-engine", plugin):
        with pytest.raises(ValueError, match=rf"cannot run under SingleDeviceStrategy on cpu: .*{install}.*{way_out}"):
            Fabric(accelerator="cpu", precision=precision)
    Fabric(accelerator="cpu", precision="fp8-reference")  # as it says
    with pytest.raises(ImportError, match=install):
        reference().setup_fp8_recipe()
    reference().convert_module(model)  # needs none of it
    assert isinstance(model[0], ReferenceLinear)


# ---------------------------------------------------------------- contexts


def test_layers_compute_in_low_precision_inside_of_the_context_alone() -> None:
    torch.manual_seed(1)
    x = torch.randn(16, 32)
    plugin, model = reference(recipe="current"), small()
    with MixedPrecision("bf16-mixed", "cpu").forward_context():
        mixed = model(x)
    plain = model(x)
    plugin.convert_module(model)
    assert torch.equal(model(x), plain)
    with plugin.forward_context():
        low = model(x)
    assert low.dtype is torch.bfloat16 and not torch.equal(low, mixed)
    assert (low.float() - plain).norm() / plain.norm() < 0.1
    with pytest.raises(KeyError), plugin.forward_context():
        raise KeyError
    assert torch.equal(model(x), plain) and not torch.is_autocast_enabled("cpu")


def amax(model: nn.Module) -> Tensor:
    return torch.stack([value for key, value in model.state_dict().items() if key.endswith("_extra_state")])


def test_calibrating_computes_in_the_base_mode_and_notes_the_largest_values() -> None:
    torch.manual_seed(1)
    x = torch.randn(16, 32) * 100
    model, plugin = small(), reference()
    with MixedPrecision("bf16-mixed", "cpu").forward_context():
        mixed = model(x)
    plugin.convert_module(model)
    with torch.no_grad(), plugin.calibrating(), plugin.forward_context():
        assert torch.equal(model(x), mixed)
    scale_of_input = amax(model)[0, 0, 0]
    assert scale_of_input.item() == pytest.approx(448 / x.to(torch.bfloat16).abs().max().item())
    with pytest.raises(KeyError), plugin.calibrating():
        raise KeyError
    with torch.no_grad(), plugin.forward_context():
        assert not torch.equal(model(x), mixed)


@pytest.mark.parametrize("recipe", ["delayed", "current", "block", "mxfp8"])
def test_a_checkpointed_forward_gives_the_same_gradients(recipe: str) -> None:
    def run(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(2)
        model, plugin = small(), reference(recipe=recipe)
        fabric = Fabric(accelerator="cpu", precision=plugin)
        forward = (lambda layers, x: plugin.checkpoint(layers, x)) if checkpointed else (lambda layers, x: layers(x))
        model.forward = lambda x: forward(nn.Sequential.forward.__get__(model), x)  # type: ignore[assignment]
        fabric.setup(model)
        for _ in range(3):
            x = torch.randn(16, 32, requires_grad=True)
            fabric.backward(model(x).square().mean())
        return [param.grad for param in model.parameters() if param.grad is not None] + [
            value for key, value in model.state_dict().items() if key.endswith("_extra_state")
        ]

    plain, checkpointed = run(False), run(True)
    assert len(plain) == len(checkpointed) >= 4
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


# ---------------------------------------------------------------- processes


def train_on_own_data(reduce_amax: bool) -> tuple[Tensor, Tensor]:
    plugin = reference(recipe=Delayed(amax_history_len=4, reduce_amax=reduce_amax))
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2, precision=plugin)
    model = small()
    optimizer = SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    generator = torch.Generator().manual_seed(fabric.global_rank)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(16, 32, generator=generator) * (1 + fabric.global_rank)
        fabric.backward(model(x).square().mean())
        optimizer.step()
    state = amax(model)
    fabric.teardown()
    return state, model[0].weight.detach()


def test_ranks_share_their_largest_values_unless_the_recipe_says_no() -> None:
    (first, weight), (second, other) = run_in_ranks(2, train_on_own_data, True)
    assert torch.equal(first, second) and torch.equal(weight, other) and first[:, 1:].abs().sum() > 0
    (first, weight), (second, other) = run_in_ranks(2, train_on_own_data, False)
    assert not torch.equal(first[0, :, 0], second[0, :, 0]) and torch.equal(weight, other)


# ---------------------------------------------------------------- state


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    def start() -> tuple[Fabric, Any, Any]:
        fabric = Fabric(accelerator="cpu", precision="fp8-reference")
        model = small()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        fabric.setup(model, optimizer)
        return fabric, model, optimizer

    def steps(fabric: Fabric, model: Any, optimizer: Any, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            optimizer.zero_grad()
            fabric.backward(model(torch.randn(16, 32) * (1 + number)).square().mean())
            optimizer.step()

    whole = start()
    steps(*whole, range(8))
    half = start()
    steps(*half, range(4))
    half[0].save(tmp_path / "half.ckpt", {"model": half[1], "optimizer": half[2]})
    resumed = start()
    resumed[0].load(tmp_path / "half.ckpt", {"model": resumed[1], "optimizer": resumed[2]})
    steps(*resumed, range(4, 8))
    assert torch.equal(amax(resumed[1]), amax(whole[1]))
    assert all(torch.equal(a, b) for a, b in zip(resumed[1].parameters(), whole[1].parameters(), strict=True))


def test_states_of_plugins_go_from_one_to_another() -> None:
    plugin, other = reference(), reference(recipe="current")
    state = copy.deepcopy(plugin.state_dict())
    other.load_state_dict(state)
    assert state["mode"] == "fp8-reference" and any("fp8-reference" in note for note in other.report.notes)
    with pytest.raises(ValueError, match=r"not a Precision state dict \(missing: version, mode, scaler"):
        plugin.load_state_dict({})


def test_two_plugins_in_one_process_do_not_meet() -> None:
    x = torch.randn(16, 32)
    outputs = []
    for together in (False, True):
        models = []
        for recipe in ("current", "nvfp4"):
            plugin = reference(recipe=recipe)
            plugin.connect(SingleDeviceStrategy())
            models.append((plugin, plugin.convert_module(small())))
        for plugin, model in models if together else models[::-1]:
            with plugin.forward_context(), torch.no_grad():
                outputs.append((plugin.recipe.name, model(x)))
    by_name: dict[str, list[Tensor]] = {}
    for name, output in outputs:
        by_name.setdefault(name, []).append(output)
    assert all(torch.equal(*pair) for pair in by_name.values())
    assert not torch.equal(by_name["current"][0], by_name["nvfp4"][0])
