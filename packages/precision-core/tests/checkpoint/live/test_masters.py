"""Masters in checkpoints: between modes each bit goes over that the other can hold, and what is dropped is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Adam

from precision_core import CheckpointError, Fabric, HalfPrecision, MixedPrecision
from precision_core.precision.masters import KEYS, MASTER, REST
from precision_core.testing.stored import Model, equal, give_gradients


def run(mode: str, seed: int = 0, steps: int = 3) -> tuple[Fabric, Model, Adam]:
    """Returns a run of some steps, whose gradients are the same in every mode."""
    scaler = {"init_scale": 16.0}  # under which the gradients are exact in float16
    plugins: dict[str, Any] = {
        "16-master": HalfPrecision("16-master", scaler=scaler),
        "16-mixed": MixedPrecision("16-mixed", "cpu", scaler),
    }
    fabric, model = Fabric("cpu", precision=plugins.get(mode, mode)), Model(seed)
    optimizer = Adam(model.values, foreach=True)
    fabric.setup(model, optimizer)
    for number in range(steps):
        step(fabric, model, optimizer, number)
    return fabric, model, optimizer


def step(fabric: Fabric, model: Model, optimizer: Adam, number: int) -> None:
    """Steps on gradients that are the same in every mode, scaled where the mode scales."""
    plugin = fabric.precision_plugin
    if plugin.policy.scale:
        plugin.pre_backward(torch.zeros((), requires_grad=True) * 1.0, model).backward()
    give_gradients(model.values, number)
    if plugin.policy.scale:
        torch._foreach_mul_([param.grad for param in model.values if param.grad is not None], plugin.scale)
        plugin.scaler.after_backward()
    plugin.optimizer_step(optimizer, model, None)
    assert not plugin.last_step_skipped


def values(fabric: Fabric, model: Model) -> list[Tensor]:
    """Returns what the optimizer steps, as float32 has it."""
    return [fabric.precision_plugin.masters.value(param).float() for param in model.values]


def moments(optimizer: Adam) -> list[Tensor]:
    return [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]


WIDE = ("32-true", "16-mixed", "bf16-master", "16-master")
OF = {"bf16-master": REST, "16-master": MASTER}


def unfrozen(model: Model) -> Any:
    """A filter: the frozen parameter is bfloat16 under half modes, and no master."""
    return {"model": lambda name, value: name != "frozen"}


@pytest.mark.parametrize("target", WIDE)
@pytest.mark.parametrize("source", WIDE)
def test_float32_and_masters_load_into_each_other_exactly(source: str, target: str, tmp_path: Path) -> None:
    fabric, model, optimizer = run(source)
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    other, live, loaded = run(target, seed=1, steps=1)
    other.load(tmp_path / "last", {"model": live, "optimizer": loaded}, filter=unfrozen(live))
    assert equal(values(other, live), values(fabric, model))
    assert equal(moments(loaded), moments(optimizer)) and moments(loaded)[0].dtype is torch.float32
    kept = [{*KEYS} & state.keys() for state in loaded.state_dict()["state"].values()]
    assert kept == [{OF[target]} if target in OF else set()] * 6
    assert not any("dropped" in note for note in other.precision_plugin.report.notes)
    for each, its, at in ((fabric, model, optimizer), (other, live, loaded)):
        step(each, its, at, 3)
    assert equal(values(other, live), values(fabric, model))


@pytest.mark.parametrize("mode", OF)
def test_without_what_is_beside_weights_the_resumed_run_is_another(mode: str) -> None:
    """The negative control: a checkpoint from which the masters are taken does not resume float32's run."""
    fabric, model, optimizer = run(mode)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        del entry[OF[mode]]
    _, live, loaded = other = run(mode, seed=1)
    live.load_state_dict(model.state_dict())
    loaded.load_state_dict(state)
    assert equal([each.detach() for each in live.values], [each.detach() for each in model.values])
    assert not equal(values(other[0], live), values(fabric, model))


DROPPED = {
    "bf16": "the other 16 bits of the float32 master weights of values.0, values.1, values.2, values.3, values.4 and 1",
    "16": "the float32 master weights of values.0, values.1, values.2, values.3, values.4 and 1",
}


@pytest.mark.parametrize("has_optimizer", [True, False], ids=["with the optimizer", "the model alone"])
@pytest.mark.parametrize(("half", "dtype"), [("bf16", torch.bfloat16), ("16", torch.float16)])
def test_a_narrower_target_says_what_it_drops(
    half: str, dtype: torch.dtype, has_optimizer: bool, tmp_path: Path
) -> None:
    fabric, model, optimizer = run(f"{half}-master")
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    other, live, loaded = Fabric("cpu", precision=f"{half}-true"), Model(1), None
    loaded = Adam(live.values, eps=1e-4, foreach=True)
    other.setup(live, loaded)
    state = {"model": live, **({"optimizer": loaded} if has_optimizer else {})}
    before = [param.detach().clone() for param in live.values]
    with pytest.raises(CheckpointError) as error:
        other.load(tmp_path / "last", state)
    assert f"{DROPPED[half]} more, which are {str(dtype).removeprefix('torch.')} here" in str(error.value)
    assert "strict=False drops them" in str(error.value)
    assert equal([param.detach() for param in live.values], before)
    other.load(tmp_path / "last", state, strict=False)
    assert equal([param.detach() for param in live.values], [param.detach() for param in model.values])
    assert any(DROPPED[half] in note for note in other.precision_plugin.report.notes)
    if has_optimizer:
        assert {each.dtype for each in moments(loaded)} == {dtype}
        assert equal(moments(loaded), [each.to(dtype) for each in moments(optimizer)])
        assert not any({*KEYS} & entry.keys() for entry in loaded.state.values())


@pytest.mark.parametrize(("source", "target"), [("16-master", "bf16-true"), ("bf16-master", "16-true")])
def test_another_half_dtype_gets_the_masters_rounded_once(source: str, target: str, tmp_path: Path) -> None:
    fabric, model, optimizer = run(source)
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    other, live = Fabric("cpu", precision=target), Model(1)
    other.setup(live)
    live.frozen.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"torch\.float32 in the checkpoint, torch\.b?float16 in the model"):
        other.load(tmp_path / "last", {"model": live})
    other.load(tmp_path / "last", {"model": live}, strict=False)
    dtype = live.values[0].dtype
    assert equal([param.detach() for param in live.values], [each.to(dtype) for each in values(fabric, model)])


@pytest.mark.parametrize("source", ["16-true", "bf16-true"])
def test_half_weights_become_float16_masters(source: str, tmp_path: Path) -> None:
    fabric, model = Fabric("cpu", precision=source), Model()
    fabric.setup(model)
    fabric.save(tmp_path / "last", {"model": model})
    other, live, optimizer = run("16-master", seed=1)
    other.load(tmp_path / "last", {"model": live}, filter=unfrozen(live))
    assert equal(values(other, live), [param.detach().float() for param in model.values])
    kept = [MASTER in state for state in optimizer.state_dict()["state"].values()]
    assert kept == [source == "bf16-true"] * 6  # of float16 the weights are all there is


def test_weights_beyond_float16_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    fabric, model, _ = run("32-true")
    with torch.no_grad():
        model.values[1][3] = 70_000.0
    fabric.save(tmp_path / "last", {"model": model})
    other, live, _ = run("16-master", seed=1)
    before = values(other, live)
    with pytest.raises(CheckpointError, match=r"values\.1: weights beyond 65,504, the largest float16"):
        other.load(tmp_path / "last", {"model": live}, filter=unfrozen(live))
    assert equal(values(other, live), before)


def test_state_in_bfloat16_leaves_masters_in_float32(tmp_path: Path) -> None:
    policy = "params=float16,master=float32,state=bfloat16"
    fabric, model, optimizer = run("16-master")
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    other, live = Fabric("cpu", precision=HalfPrecision(policy, scaler={"init_scale": 16.0})), Model(1)
    loaded = Adam(live.values, foreach=True)
    other.setup(live, loaded)
    other.load(tmp_path / "last", {"model": live, "optimizer": loaded}, strict=False)
    assert equal(values(other, live), values(fabric, model))
    assert {each.dtype for each in moments(loaded)} == {torch.bfloat16}
    assert {state[MASTER].dtype for state in loaded.state_dict()["state"].values()} == {torch.float32}
    _, again = Fabric("cpu", precision=policy).setup(half := Model(1), Adam(half.values, foreach=True))
    again.load_state_dict(loaded.state_dict())
    assert {each.dtype for each in moments(again)} == {torch.bfloat16}
    assert {state[MASTER].dtype for state in again.state.values()} == {torch.float32}


def test_bfloat16_widens(tmp_path: Path) -> None:
    fabric, model, optimizer = run("bf16-true")
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    other, live, loaded = run("bf16-master", seed=1)
    other.load(tmp_path / "last", {"model": live, "optimizer": loaded})
    assert equal(values(other, live), [param.detach().float() for param in model.values])
    assert equal(moments(loaded), [each.float() for each in moments(optimizer)])
    assert not any(REST in state for state in loaded.state_dict()["state"].values())  # all zeros


@pytest.mark.parametrize("target", OF)
@pytest.mark.parametrize("source", ["32-true", *OF])
def test_a_model_alone_brings_its_bits(source: str, target: str, tmp_path: Path) -> None:
    fabric, model, optimizer = run(source)
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    other, live, loaded = run(target, seed=1)
    other.load(tmp_path / "last", {"model": live}, filter=unfrozen(live))
    assert equal(values(other, live), values(fabric, model))
    assert all(OF[target] in state for state in loaded.state_dict()["state"].values())


@pytest.mark.parametrize(
    ("mode", "weight", "beside"),
    [("bf16-master", torch.bfloat16, torch.int16), ("16-master", torch.float16, torch.float32)],
)
def test_a_models_state_dict_is_the_models(mode: str, weight: torch.dtype, beside: torch.dtype, tmp_path: Path) -> None:
    fabric, model, optimizer = run(mode)
    assert list(model.state_dict()) == list(Model().state_dict())
    assert {value.dtype for value in model.state_dict().values()} == {weight}
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    saved = fabric.load(tmp_path / "last")
    assert list(saved["model"]) == list(model.state_dict())
    assert saved["optimizer"]["state"][0][OF[mode]].dtype is beside


@pytest.mark.parametrize("mode", OF)
def test_module_files_have_the_masters(mode: str, tmp_path: Path) -> None:
    fabric, model, _ = run(mode)
    fabric.save_module(tmp_path / "half.safetensors", model)
    fabric.save_module(tmp_path / "full.safetensors", model, dtype=torch.float32)
    wide = Model(1)
    Fabric("cpu").load_module(tmp_path / "full.safetensors", wide)
    assert equal([param.detach() for param in wide.values], values(fabric, model))
    Fabric("cpu").load_module(tmp_path / "half.safetensors", wide)
    assert equal([param.detach() for param in wide.values], [param.detach().float() for param in model.values])
    other, live, optimizer = run(mode, seed=1)
    live.frozen.requires_grad_(True)  # else it is bfloat16 and no more, and float32 does not fit
    other.load_module(tmp_path / "full.safetensors", live)
    assert equal(values(other, live), values(fabric, model))
    assert all(OF[mode] in state for state in optimizer.state_dict()["state"].values())
