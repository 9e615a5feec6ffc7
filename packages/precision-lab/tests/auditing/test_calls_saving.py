"""What a checkpoint has in it is read from what is handed to the function that writes it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from precision_lab.auditing.record import Event
from precision_lab.auditing.recorder import Recorder

MODEL = nn.Linear(2, 2)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)
HALF = {name: value.half() for name, value in MODEL.state_dict().items()}


def saved(write: Callable[[Path], Any], folder: Path) -> list[Event]:
    recorder = Recorder()
    with recorder:
        recorder.watch_late()
        write(folder / "file")
    return recorder.record.of("saved")


@dataclass
class State:
    weights: Any
    optimizer: Any


def pickled(file: Path) -> None:
    with open(file, "wb") as stream:
        pickle.dump({"a": [HALF]}, stream)


@pytest.mark.parametrize(
    ("write", "paths"),
    [
        (lambda file: torch.save({"a": HALF}, file), ["a.weight", "a.bias"]),
        (lambda file: torch.save(State(HALF, None), file), ["weights.weight", "weights.bias"]),
        (pickled, ["a.0.weight", "a.0.bias"]),
        (lambda file: file.write_bytes(pickle.dumps(HALF)), ["weight", "bias"]),
        (lambda file: np.savez(file, **{key: value.numpy() for key, value in HALF.items()}), ["weight", "bias"]),
    ],
)
def test_tensors(write: Callable[[Path], Any], paths: list[str], tmp_path: Path) -> None:
    (event,) = saved(write, tmp_path)
    assert event.tensors == dict.fromkeys(paths, torch.float16)
    assert not event.optimizer and not event.scaler


@pytest.mark.parametrize(
    ("content", "optimizer", "scaler"),
    [
        ({"o": OPTIMIZER.state_dict()}, True, False),
        (State(MODEL, OPTIMIZER), True, False),
        ([torch.amp.GradScaler("cpu").state_dict()], False, True),
        (torch.amp.GradScaler("cpu"), False, True),
    ],
)
def test_optimizer_and_scaler(content: Any, optimizer: bool, scaler: bool, tmp_path: Path) -> None:
    (event,) = saved(lambda file: torch.save(content, file), tmp_path)
    assert (event.optimizer, event.scaler) == (optimizer, scaler)


def test_what_has_no_tensor_is_no_checkpoint(tmp_path: Path) -> None:
    assert saved(lambda file: file.write_bytes(pickle.dumps({"words": ["a"], "size": 3})), tmp_path) == []


def test_in_memory_it_is_the_checkpoint(tmp_path: Path) -> None:
    (event,) = saved(lambda file: torch.save(HALF, io.BytesIO()), tmp_path)
    assert event.file == "the checkpoint"
