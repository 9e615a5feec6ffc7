"""A checkpoint is complete: a run that resumes from it equals the run that was never stopped, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from precision_core import Fabric
from precision_core.testing.checks_loop import train_net as train

if TYPE_CHECKING:
    from precision_core.testing.contract import Contract


def the_precisions_state_is_saved_and_loaded_by_hand(kit: Contract, folder: Path) -> None:
    fabric, model, optimizer = kit.setup()
    train(fabric, model, optimizer, range(5))
    state = {"model": model, "optimizer": optimizer, "precision": fabric.precision_plugin.state_dict()}
    fabric.save(folder / "checkpoint.ckpt", state)
    other = kit.make_fabric()
    loaded = other.load(folder / "checkpoint.ckpt")
    other.precision_plugin.load_state_dict(loaded["precision"])
    assert_equal(other.precision_plugin.state_dict(), fabric.precision_plugin.state_dict())
    assert loaded["model"].keys() == model.state_dict().keys()


def resuming_is_bit_exact(kit: Contract, folder: Path) -> None:
    Fabric.seed_everything(1)
    fabric, model, optimizer = kit.setup()
    expected = train(fabric, model, optimizer, range(12))
    values, state = kit.values(model), fabric.precision_plugin.state_dict()

    Fabric.seed_everything(1)
    fabric, model, optimizer = kit.setup()
    losses = train(fabric, model, optimizer, range(6))
    fabric.save(folder / "half.ckpt", {"model": model, "optimizer": optimizer, "done": 6})

    Fabric.seed_everything(2)
    fabric, model, optimizer = kit.setup(seed=1)
    train(fabric, model, optimizer, range(100, 102))
    progress: dict[str, Any] = {"model": model, "optimizer": optimizer, "done": 0}
    fabric.load(folder / "half.ckpt", progress)
    assert progress["done"] == 6
    losses += train(fabric, model, optimizer, range(6, 12))
    assert losses == expected
    assert_equal(kit.values(model), values)
    assert_equal(fabric.precision_plugin.state_dict(), state)


def the_precisions_state_survives_a_round_trip(kit: Contract, folder: Path) -> None:
    fabric, model, optimizer = kit.setup()
    fresh = kit.make_fabric().precision_plugin
    start = fresh.state_dict()
    train(fabric, model, optimizer, range(30))
    state = fabric.precision_plugin.state_dict()
    assert state["steps"] != start["steps"] and state.keys() == start.keys()
    path = folder / f"precision-{fabric.global_rank}.pt"  # every rank writes its own
    torch.save(state, path)
    fresh.load_state_dict(torch.load(path, weights_only=True))
    assert_equal(fresh.state_dict(), state)
    assert (fresh.steps, fresh.skipped_steps, fresh.scale) == (
        fabric.precision_plugin.steps,
        fabric.precision_plugin.skipped_steps,
        fabric.precision_plugin.scale,
    )


def an_invalid_state_is_refused_and_changes_nothing(kit: Contract) -> None:
    plugin = kit.make_fabric().precision_plugin
    before = plugin.state_dict()
    for wrong in ({}, {"garbage": 1}, {**before, "version": 10**6}, {**before, "steps": "many"}):
        with pytest.raises(ValueError):
            plugin.load_state_dict(wrong)
        assert_equal(plugin.state_dict(), before)


def assert_equal(mine: Any, theirs: Any) -> None:
    """Asserts that two states have equal keys, types and values; tensors bit for bit."""
    assert type(mine) is type(theirs)
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_equal(mine[key], theirs[key])
    elif isinstance(mine, Tensor):
        assert mine.dtype is theirs.dtype and torch.equal(mine, theirs)
    else:
        assert mine == theirs
