"""The promise to users: names, order and defaults of the packages' classes, and the documented usages, on the CPU."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import (
    MODES,
    DoublePrecision,
    Fabric,
    HalfPrecision,
    MixedPrecision,
    Precision,
    SingleDeviceStrategy,
)
from precision_core.testing import run_in_ranks

REQUIRED = inspect.Parameter.empty
HOOKS: dict[str, list[str]] = {
    "convert_module": ["module"],
    "convert_input": ["data"],
    "convert_output": ["data"],
    "pre_backward": ["tensor", "module"],
    "post_backward": ["tensor", "module"],
    "forward_context": [],
    "optimizer_step": ["optimizer", "model", "closure"],
    "state_dict": [],
    "load_state_dict": ["state_dict"],
}
TABLE: dict[str, tuple[dict[str, Any], list[str]]] = {  # class -> positional parameters with defaults, methods
    "precision_core.Precision": ({}, list(HOOKS)),
    "precision_core.DoublePrecision": ({}, ["convert_module", "convert_input", "forward_context"]),
    "precision_core.HalfPrecision": (
        {"precision": "16-true"},
        ["convert_module", "convert_input", "forward_context"],
    ),
    "precision_core.MixedPrecision": (
        {"precision": "16-mixed", "device": "cuda", "scaler": None},
        ["setup_scaler", "forward_context", "optimizer_step", "pre_backward", "post_backward"],
    ),
    "precision_core.Fabric": (
        {"accelerator": "auto", "strategy": "auto", "devices": "auto", "precision": "32-true"},
        ["setup", "setup_dataloaders", "autocast", "backward", "clip_gradients", "save", "load"],
    ),
    "precision_bnb.BitsandbytesPrecision": (
        {"mode": REQUIRED, "dtype": None, "ignore_modules": None},
        ["convert_module", "setup_bnb_config"],
    ),
    "precision_deepspeed.DeepSpeedPrecision": (
        {"precision": "16-mixed", "amp_type": "native", "amp_level": None},
        ["convert_module", "forward_context"],
    ),
    "precision_fsdp.FSDPPrecision": (
        {"precision": "32-true", "scaler": None},
        ["convert_module", "setup_mixed_precision_config"],
    ),
    "precision_xla.XLAPrecision": ({"precision": "32-true"}, ["convert_module", "forward_context"]),
    "precision_te.TransformerEnginePrecision": (
        {"precision": "16-mixed", "replace_layers": True, "fp8_format": "hybrid"},
        ["convert_module", "setup_fp8_recipe"],
    ),
}


def named(path: str) -> Any:
    """Returns the class at `path`; skips where its package is not installed."""
    package, _, name = path.partition(".")
    return getattr(pytest.importorskip(package, reason=f"{package.replace('_', '-')} is not installed here"), name)


def positional(function: Any) -> dict[str, Any]:
    """Returns name -> default of the parameters that may be given by position; more by keyword may follow."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters
    extra = [each for each in parameters.values() if each.kind is inspect.Parameter.KEYWORD_ONLY]
    assert all(each.default is not inspect.Parameter.empty for each in extra)
    return {name: each.default for name, each in parameters.items() if each.kind in kinds and name != "self"}


@pytest.mark.parametrize("path", TABLE)
def test_constructors_have_these_parameters_in_this_order(path: str) -> None:
    assert list(positional(named(path)).items()) == list(TABLE[path][0].items())


@pytest.mark.parametrize("path", TABLE)
def test_methods_have_these_parameters_in_this_order(path: str) -> None:
    cls = named(path)
    for name in TABLE[path][1]:
        assert callable(getattr(cls, name)), name
    if cls is Fabric:
        return
    for name, parameters in HOOKS.items():  # no plugin takes a hook away from the base
        given = positional(getattr(cls, name))
        assert list(given) == parameters, name
        assert set(given.values()) <= {REQUIRED}, name
    step = inspect.signature(cls.optimizer_step).parameters
    assert [each.kind for each in step.values()][-1] is inspect.Parameter.VAR_KEYWORD


def test_hooks_return_what_is_promised() -> None:
    for plugin in (Precision(), DoublePrecision(), HalfPrecision(), MixedPrecision(16, "cpu")):
        model = nn.Linear(1, 1)
        assert plugin.convert_module(model) is model
        assert isinstance(plugin.forward_context(), AbstractContextManager)
        loss = model.weight.sum()
        scaled = plugin.pre_backward(loss, model)
        assert torch.equal(plugin.post_backward(scaled, model), loss)
        assert scaled.item() == loss.item() * plugin.scale
        state = plugin.state_dict()
        assert type(state) is dict and plugin.load_state_dict(state) is None and plugin.state_dict() == state
    scaler = MixedPrecision(16, "cpu").setup_scaler()
    assert isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled()


def test_modes_and_their_int_aliases_are_taken_everywhere() -> None:
    assert MixedPrecision(16, "cpu").policy == MODES["16-mixed"]
    assert Fabric(accelerator="cpu", precision=16).precision_plugin.policy == MODES["16-mixed"]
    assert Fabric(accelerator="cpu", precision=64).precision_plugin.policy == MODES["64-true"]
    with pytest.raises(ValueError):
        HalfPrecision(16)


@pytest.mark.parametrize("mode", list(MODES))
def test_optimizer_step_returns_the_closures_true_result_also_when_skipped(mode: str) -> None:
    fabric = Fabric(accelerator="cpu", precision=mode)
    model = fabric.setup(nn.Linear(1, 1, bias=False))
    optimizer, plugin = torch.optim.SGD(model.parameters(), lr=0.1), fabric.precision_plugin
    for factor in (1.0, float("inf")):

        def closure(factor: float = factor) -> Any:
            optimizer.zero_grad()
            fabric.backward((model.weight * factor).sum())
            return torch.tensor(5.0)

        assert plugin.optimizer_step(optimizer, None, closure) == 5.0
    assert plugin.last_step_skipped is plugin.policy.scale
    optimizer.zero_grad()
    fabric.backward(model.weight.sum() * 0)
    assert plugin.optimizer_step(optimizer, model, None) is None


# ---------------------------------------------------------------- usages


def test_usage_1_basic() -> None:
    fabric = Fabric(precision="16-mixed", accelerator="cpu")
    assert fabric.precision_plugin.policy == MODES["16-mixed"]
    fabric = Fabric(precision="bf16-mixed", accelerator="cpu")
    assert fabric.precision_plugin.policy == MODES["bf16-mixed"]


def test_usage_2_custom_amp() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000)
    fabric = Fabric(precision=MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler), accelerator="cpu")
    assert fabric.precision_plugin.setup_scaler() is scaler  # type: ignore[attr-defined]
    assert fabric.precision_plugin.scale == 2**16


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
@pytest.mark.filterwarnings("ignore")  # torch's: the class is deprecated, and CUDA is missing
def test_usage_2_verbatim_without_cuda_is_an_error() -> None:
    scaler = torch.cuda.amp.GradScaler(init_scale=2**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000)
    with pytest.raises(ValueError, match="is not here, so torch has disabled it and dropped its values"):
        Fabric(precision=MixedPrecision(precision="16-mixed", device="cuda", scaler=scaler), accelerator="gpu")


def test_usage_3_bitsandbytes() -> None:
    plugin_class = named("precision_bnb.BitsandbytesPrecision")
    plugin = plugin_class(mode="int8")
    assert plugin.setup_bnb_config().load_in_8bit
    plugin = plugin_class(mode="nf4", dtype=torch.bfloat16, ignore_modules={"lm_head", "embed_tokens"})
    fabric = Fabric(precision=plugin, accelerator="cpu")
    assert fabric.precision_plugin is plugin
    layers = {"embed_tokens": nn.Linear(64, 64), "up": nn.Linear(64, 64), "lm_head": nn.Linear(64, 3)}
    model = fabric.setup(nn.Sequential(OrderedDict(layers)))
    assert {name: layer.weight.dtype for name, layer in model.named_children()} == {
        "embed_tokens": torch.float32,  # what trains
        "up": torch.uint8,
        "lm_head": torch.float32,
    }
    assert model.up.weight.nbytes <= 64 * 64 * 4.5 / 8 + 32
    assert model(torch.ones(2, 64)).dtype is torch.float32


@pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
def test_usage_4_deepspeed() -> None:
    named("precision_deepspeed.DeepSpeedStrategy")
    for losses, params in run_in_ranks(2, lambda: usage_4()):  # a closure: the engine leaves traces in its process
        assert losses[-1] < losses[0] / 4
        assert params == {torch.float32}


def usage_4() -> tuple[list[float], set[torch.dtype]]:
    from precision_deepspeed import DeepSpeedPrecision, DeepSpeedStrategy

    precision = DeepSpeedPrecision(precision="16-mixed")
    return train_a_line(Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage=2), precision=precision, devices=2))


def test_usage_5_fsdp() -> None:
    named("precision_fsdp.FSDPStrategy")
    for losses, params in run_in_ranks(2, usage_5):
        assert losses[-1] < losses[0] / 4
        assert params == {torch.float32}


def usage_5() -> tuple[list[float], set[torch.dtype]]:
    from torch.distributed.fsdp import MixedPrecision as FSDPMixedPrecision

    from precision_fsdp import FSDPPrecision, FSDPStrategy

    strategy = FSDPStrategy(
        mixed_precision=FSDPMixedPrecision(
            param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16
        )
    )
    fabric = Fabric(accelerator="cpu", strategy=strategy, precision=FSDPPrecision(precision="bf16-mixed"), devices=2)
    assert fabric.precision_plugin.policy.reduce is torch.bfloat16
    return train_a_line(fabric)


def train_a_line(fabric: Fabric) -> tuple[list[float], set[torch.dtype]]:
    """Returns the losses of a few steps, and the dtypes of the parameters."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    losses = []
    for _ in range(40):
        inputs = torch.randn(4, 3)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses, {param.dtype for param in model.parameters()}


def setting(mode: str) -> tuple[Fabric, Any, Any, Any, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(5, 4, 3)
    fabric = Fabric(accelerator="cpu", precision=mode)
    output_dtype = fabric.precision_plugin.policy.output  # float64 against float32 targets is no loss in torch 2.9
    dataloader = [{"input": x, "target": x.sum(1, keepdim=True).to(output_dtype)} for x in inputs]
    return fabric, model, optimizer, nn.MSELoss(), list(fabric.setup_dataloaders(dataloader))


@pytest.mark.parametrize("mode", list(MODES))
def test_usage_7_manual_autocast_and_8_clipping(mode: str) -> None:
    fabric, model, optimizer, criterion, dataloader = setting(mode)
    model, optimizer = fabric.setup(model, optimizer)
    losses = []
    for batch in dataloader * 8:
        optimizer.zero_grad()
        with fabric.autocast():
            predictions = model(batch["input"])
            loss = criterion(predictions, batch["target"])
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        norm = nn.utils.get_total_norm([param.grad for param in model.parameters()])
        assert norm <= 1.01 or not norm.isfinite() or mode == "16-master"  # whose gradients the step clips
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_usage_9_precision_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fabric, model, optimizer, criterion, dataloader = setting("16-mixed")
    model, optimizer = fabric.setup(model, optimizer)
    for batch in dataloader:
        optimizer.zero_grad()
        fabric.backward(criterion(model(batch["input"]), batch["target"] * 1e4))  # overflows, so that the scale falls
        optimizer.step()
    saved_state = fabric.precision_plugin.state_dict()
    assert fabric.precision_plugin.skipped_steps > 0

    state = {"model": model, "optimizer": optimizer, "precision": fabric.precision_plugin.state_dict()}
    fabric.save("checkpoint.ckpt", state)

    fabric = Fabric(accelerator="cpu", precision="16-mixed")
    loaded_state = fabric.load("checkpoint.ckpt")
    fabric.precision_plugin.load_state_dict(loaded_state["precision"])
    assert fabric.precision_plugin.state_dict() == saved_state
    assert torch.equal(loaded_state["model"]["weight"], model.weight)


def test_a_strategy_object_is_taken_by_keyword() -> None:
    assert Fabric(accelerator="cpu", strategy=SingleDeviceStrategy("cpu"), devices=1).world_size == 1
