"""Masters in checkpoints: between modes each bit goes over that the other can hold, and what is dropped is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Adam

from precision_core import CheckpointError, Fabric
from precision_core.precision.masters import KEY
from precision_core.testing.stored import Model, equal, give_gradients


def run(mode: str, seed: int = 0, steps: int = 3) -> tuple[Fabric, Model, Adam]:
    """Returns a run of some steps, whose gradients are the same in every mode."""
    fabric, model = Fabric("cpu", precision=mode), Model(seed)
    optimizer = Adam(model.values, foreach=True)
    fabric.setup(model, optimizer)
    for step in range(steps):
        give_gradients(model.values, step)
        fabric.precision_plugin.optimizer_step(optimizer, model, None)
    return fabric, model, optimizer


def values(fabric: Fabric, model: Model) -> list[Tensor]:
    """Returns what the optimizer steps, as float32 has it."""
    return [fabric.precision_plugin.masters.value(param).float() for param in model.values]


def moments(optimizer: Adam) -> list[Tensor]:
    return [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]


WIDE = ("32-true", "bf16-mixed", "bf16-master")


def unfrozen(model: Model) -> Any:
    """A filter: the frozen parameter is bfloat16 under half modes, and no master."""
    return {"model": lambda name, value: name != "frozen"}


@pytest.mark.parametrize("target", WIDE)
@pytest.mark.parametrize("source", WIDE)
def test_float32_and_its_two_halves_load_into_each_other_exactly(source: str, target: str, tmp_path: Path) -> None:
    fabric, model, optimizer = run(source)
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    other, live, loaded = run(target, seed=1, steps=1)
    other.load(tmp_path / "last", {"model": live, "optimizer": loaded}, filter=unfrozen(live))
    assert equal(values(other, live), values(fabric, model))
    assert equal(moments(loaded), moments(optimizer)) and moments(loaded)[0].dtype is torch.float32
    assert all((KEY in state) == (target == "bf16-master") for state in loaded.state_dict()["state"].values())
    assert not any("dropped" in note for note in other.precision_plugin.report.notes)
    for each, its, at in ((fabric, model, optimizer), (other, live, loaded)):
        give_gradients(its.values, 3)
        each.precision_plugin.optimizer_step(at, its, None)
    assert equal(values(other, live), values(fabric, model))


def test_without_the_rest_the_resumed_run_is_another(tmp_path: Path) -> None:
    """The negative control: a checkpoint from which the rest is taken does not resume float32's run."""
    fabric, model, optimizer = run("bf16-master")
    state = optimizer.state_dict()
    for entry in state["state"].values():
        del entry[KEY]
    _, live, loaded = other = run("bf16-master", seed=1)
    live.load_state_dict(model.state_dict())
    loaded.load_state_dict(state)
    assert equal([each.detach() for each in live.values], [each.detach() for each in model.values])
    assert not equal(values(other[0], live), values(fabric, model))


@pytest.mark.parametrize("has_optimizer", [True, False], ids=["with the optimizer", "the model alone"])
def test_a_narrower_target_says_what_it_drops(has_optimizer: bool, tmp_path: Path) -> None:
    fabric, model, optimizer = run("bf16-master")
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    other, live, loaded = run("bf16-true", seed=1, steps=1)
    state = {"model": live, **({"optimizer": loaded} if has_optimizer else {})}
    before = [param.detach().clone() for param in live.values]
    with pytest.raises(CheckpointError) as error:
        other.load(tmp_path / "last", state)
    dropped = (
        "the other 16 bits of the float32 master weights of values.0, values.1, values.2, values.3, values.4 and 1"
    )
    assert dropped in str(error.value) and "strict=False drops them" in str(error.value)
    assert equal([param.detach() for param in live.values], before)
    other.load(tmp_path / "last", state, strict=False)
    assert equal([param.detach() for param in live.values], [param.detach() for param in model.values])
    assert any(dropped in note for note in other.precision_plugin.report.notes)
    if has_optimizer:
        assert {each.dtype for each in moments(loaded)} == {torch.bfloat16}
        assert equal(moments(loaded), [each.bfloat16() for each in moments(optimizer)])
        assert not any(KEY in entry for entry in loaded.state.values())


def test_bfloat16_widens(tmp_path: Path) -> None:
    fabric, model, optimizer = run("bf16-true")
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    other, live, loaded = run("bf16-master", seed=1)
    other.load(tmp_path / "last", {"model": live, "optimizer": loaded})
    assert equal(values(other, live), [param.detach().float() for param in model.values])
    assert equal(moments(loaded), [each.float() for each in moments(optimizer)])
    assert not any(KEY in state for state in loaded.state_dict()["state"].values())  # all zeros


@pytest.mark.parametrize("source", ["32-true", "bf16-master"])
def test_a_model_alone_brings_its_bits(source: str, tmp_path: Path) -> None:
    fabric, model, optimizer = run(source)
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    other, live, loaded = run("bf16-master", seed=1)
    other.load(tmp_path / "last", {"model": live}, filter=unfrozen(live))
    assert equal(values(other, live), values(fabric, model))
    assert all(KEY in state for state in loaded.state_dict()["state"].values())


def test_a_models_state_dict_is_the_models(tmp_path: Path) -> None:
    fabric, model, optimizer = run("bf16-master")
    assert list(model.state_dict()) == list(Model().state_dict())
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    fabric.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    saved = fabric.load(tmp_path / "last")
    assert list(saved["model"]) == list(model.state_dict())
    assert saved["optimizer"]["state"][0][KEY].dtype is torch.int16


def test_module_files_have_the_masters(tmp_path: Path) -> None:
    fabric, model, _ = run("bf16-master")
    fabric.save_module(tmp_path / "half.safetensors", model)
    fabric.save_module(tmp_path / "full.safetensors", model, dtype=torch.float32)
    wide = Model(1)
    Fabric("cpu").load_module(tmp_path / "full.safetensors", wide)
    assert equal([param.detach() for param in wide.values], values(fabric, model))
    Fabric("cpu").load_module(tmp_path / "half.safetensors", wide)
    assert equal([param.detach() for param in wide.values], [param.detach().float() for param in model.values])
    other, live, optimizer = run("bf16-master", seed=1)
    live.frozen.requires_grad_(True)  # else it is bfloat16 and no more, and float32 does not fit
    other.load_module(tmp_path / "full.safetensors", live)
    assert equal(values(other, live), values(fabric, model))
    assert all(KEY in state for state in optimizer.state_dict()["state"].values())
