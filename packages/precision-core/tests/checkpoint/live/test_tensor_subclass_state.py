"""Optimizers whose state is tensor subclasses (torchao's 8-bit, 4-bit and FP8) save, load and roll back bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core import CheckpointError, Fabric

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    optim = pytest.importorskip("torchao.optim")

NAMES = ["AdamW8bit", "AdamW4bit", "AdamWFp8"]
pytestmark = pytest.mark.filterwarnings("ignore")  # the vendor's, and those of torch.compile, in which they step


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[Fabric, nn.Module, Optimizer]:
    fabric = Fabric(accelerator="cpu")
    model = nn.Linear(64, 64).to(dtype)
    return fabric, model, getattr(optim, name)(model.parameters())


def fill(optimizer: Optimizer, seed: int) -> None:
    """Gives the optimizer state as a step does, which would compile for seconds."""
    torch.manual_seed(seed)
    for group in optimizer.param_groups:
        for param in group["params"]:
            new = {key: optimizer._new_buffer(param, key == "exp_avg") for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[param] = {"step": torch.tensor(float(seed)), **new}
            for state in new.values():
                state.copy_(torch.rand_like(param, dtype=torch.float32))


def parts(optimizer: Optimizer) -> list[Tensor]:
    found: list[Tensor] = []
    for state in optimizer.state.values():
        for value in state.values():
            inner: Any = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else None
            found += [value] if inner is None else [getattr(value, name) for name in inner]
    return [tensor.detach().clone().reshape(-1).view(torch.uint8) for tensor in found]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_state_comes_back_bit_for_bit(
    name: str, wait: bool, has_state: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    fabric, model, optimizer = made(name, dtype)
    fill(optimizer, 1)
    wanted = parts(optimizer)
    pending = fabric.save(tmp_path / "c", {"model": model, "optimizer": optimizer}, wait=wait)
    if not wait:
        fill(optimizer, 2)  # training goes on
    pending.wait()
    fabric, model, other = made(name, dtype)
    if has_state:
        fill(other, 3)
    fabric.load(tmp_path / "c", {"model": model, "optimizer": other})
    assert equal(parts(other), wanted)
    kinds = [[type(value) for value in each.state[p].values()] for each in (optimizer, other) for p in each.state]
    assert kinds[: len(kinds) // 2] == kinds[len(kinds) // 2 :]
    returned = fabric.load(tmp_path / "c")["optimizer"]["state"][0]["exp_avg"]
    first = next(iter(other.state.values()))["exp_avg"]
    assert type(returned) is type(first) and torch.equal(returned.dequantize(), first.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_a_load_that_fails_leaves_it_as_it_was(name: str, tmp_path: Path) -> None:
    class Fails:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise RuntimeError("no")

    fabric, model, optimizer = made(name)
    fill(optimizer, 1)
    state = {"model": model, "optimizer": optimizer, "last": Fails()}
    fabric.save(tmp_path / "c", state)
    fill(optimizer, 2)
    before = parts(optimizer)
    with pytest.raises(CheckpointError, match="last could not be loaded, nothing was changed"):
        fabric.load(tmp_path / "c", state)
    assert equal(parts(optimizer), before)
