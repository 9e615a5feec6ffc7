"""numpy's scalars in a checkpoint come back as numbers and text of the same value; all else stays what it is."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from precision_core import Fabric
from precision_core.checkpoint.live.numpy_scalars import as_python

FABRIC = Fabric(accelerator="cpu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        (np.mean([0.5, 0.75]), 0.625),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float16(0.1), float(np.float16(0.1))),
        (np.int64(2**62), 2**62),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(True), True),
        (np.complex64(1 + 2j), 1 + 2j),
        (np.str_("best"), "best"),
        (np.bytes_(b"x"), b"x"),
    ],
)
def test_a_scalar_is_saved_as_its_value(scalar: Any, value: Any, path: Path) -> None:
    nested = {"log": {"all": [scalar, (scalar, 1)], np.str_("key"): OrderedDict(x=scalar)}, "here": scalar}
    FABRIC.save(path, {**nested, np.int64(7): 1})
    loaded = FABRIC.load(path)
    assert loaded == {"log": {"all": [value, (value, 1)], "key": {"x": value}}, "here": value, 7: 1}
    found = [loaded["here"], *loaded["log"]["all"][:1], loaded["log"]["all"][1][0], loaded["log"]["key"]["x"]]
    assert {type(each) for each in found} == {type(value)}
    assert all(type(key) in (str, int) for key in (*loaded, *loaded["log"])) and type(nested["here"]) is type(scalar)


def test_objects_that_keep_scalars_resume(path: Path) -> None:
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=np.float64(0.5))
    scheduler = ReduceLROnPlateau(optimizer)
    scheduler.step(np.float32(0.25))
    state = {"model": nn.Linear(1, 1), "optimizer": optimizer, "scheduler": scheduler, "best": np.float32(0.25)}
    FABRIC.save(path, state)
    scheduler.best, state["best"] = 9.0, 9.0
    FABRIC.load(path, state)
    assert scheduler.best == state["best"] == 0.25 and optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("value", [np.datetime64("2026-01-01"), np.ones(2), np.array(1.0), np.longdouble(1)])
def test_what_has_no_value_of_python_is_refused_by_name(value: Any, path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot save \['x'\]\[0\]: a numpy\.\w+ would be rejected by torch.load"):
        FABRIC.save(path, {"x": [value]})


def test_containers_without_scalars_are_the_same_objects() -> None:
    inner, state = [1, 2], nn.Linear(1, 1).state_dict()
    tree = {"a": inner, "b": inner, "state": state, "tensor": torch.ones(1)}
    assert as_python(tree) is tree
    shared = [np.int64(1)]
    found = as_python({"a": shared, "b": shared, "state": state})
    assert found["a"] is found["b"] and found["a"] == [1] and found["state"] is state
    state["extra"] = np.float32(2.0)
    assert as_python(state)._metadata == state._metadata
