"""A call for all ranks that one makes alone is an error there, in seconds; a rank that is late is waited for."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from precision_core import CheckpointError, Fabric
from precision_core.checkpoint import presence
from precision_core.testing.ranks import run_in_ranks

pytest.importorskip("safetensors")


def backward(fabric: Fabric, model: nn.Module) -> None:
    fabric.backward(model(torch.ones(1, 2)).sum())


def barrier(fabric: Fabric, model: nn.Module) -> None:
    fabric.barrier()


def end(fabric: Fabric, model: nn.Module) -> None:
    fabric.teardown()


GOES_ON: dict[str, Callable[[Fabric, nn.Module], None]] = {"backward": backward, "barrier": barrier, "end": end}
CALLS: dict[str, Callable[[Fabric, Path, nn.Module], Any]] = {
    "fabric.save": lambda fabric, folder, model: fabric.save(folder / "c", {"model": model}),
    "fabric.load": lambda fabric, folder, model: fabric.load(folder / "c", {"model": model}),
    "fabric.save_module": lambda fabric, folder, model: fabric.save_module(folder / "m.safetensors", model),
}


def quick(function: Callable[..., Any]) -> Callable[..., Any]:
    """Has `function` ask the others sooner; the ranks that run it are kept for other tests."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(presence, "_PATIENCE", 0.2)
            patch.setattr(presence, "_BETWEEN", 0.1)
            return function(*args)

    return run


def made() -> tuple[Fabric, nn.Module]:
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    return fabric, fabric.setup(nn.Linear(2, 1))


@quick
def alone(folder: Path, call: str, goes_on: str, caller: int) -> tuple[str, float]:
    fabric, model = made()
    fabric.save(folder / "c", {"model": model})  # on all ranks: the numbers of calls are told apart
    said, began = "", time.monotonic()
    if fabric.global_rank == caller:
        try:
            CALLS[call](fabric, folder, model)
        except CheckpointError as error:
            said = str(error)
    took = time.monotonic() - began
    GOES_ON[goes_on](fabric, model)  # the caller meets the other there, who waits
    fabric.teardown()
    return said, took


@pytest.mark.parametrize(
    ("call", "goes_on", "caller"),
    [
        ("fabric.save", "backward", 0),
        ("fabric.save", "end", 0),
        ("fabric.save", "barrier", 1),
        ("fabric.load", "backward", 0),
        ("fabric.save_module", "backward", 0),
    ],
)
def test_a_call_of_one_rank_alone(call: str, goes_on: str, caller: int, tmp_path: Path) -> None:
    told = run_in_ranks(2, alone, tmp_path, call, goes_on, caller)
    said, took = told[caller]
    what = "has ended" if goes_on == "end" else r"has gone on (a backward, another collective)"
    assert said.startswith(f"{call} was called on rank {caller}, and rank {1 - caller} {what} without calling it.")
    assert f"All ranks must call {call}" in said and took < 10
    assert told[1 - caller][0] == ""


@quick
def late(folder: Path, seconds: float) -> list[float]:
    fabric, model = made()
    backward(fabric, model)
    took = []
    for rank in (0, 1):
        if fabric.global_rank == rank:
            time.sleep(seconds)
        began = time.monotonic()
        fabric.save(folder / "c", {"model": model}, wait=rank == 0)
        took.append(time.monotonic() - began)
    fabric.load(folder / "c", {"model": model})
    fabric.teardown()
    return took


@pytest.mark.parametrize("seconds", [1.0, pytest.param(60.0, marks=pytest.mark.full)])
def test_a_rank_that_is_late_is_waited_for(seconds: float, tmp_path: Path) -> None:
    first, second = run_in_ranks(2, late, tmp_path, seconds, timeout=180)
    assert second[0] > seconds * 0.9 and first[1] > seconds * 0.9


@quick
def goes_on_after_an_error(folder: Path) -> bool:
    fabric, model = made()
    other = dist.new_group(backend="gloo")
    if fabric.global_rank == 0:
        with pytest.raises(CheckpointError, match="has gone on"):
            fabric.save(folder / "c", {"model": model})
    dist.barrier(other)  # rank 1 waits here meanwhile
    fabric.save(folder / "c", {"model": model})
    found = fabric.load(folder / "c", {"model": model}) == {}
    fabric.teardown()
    return found


def test_after_the_error_all_ranks_can_save(tmp_path: Path) -> None:
    assert run_in_ranks(2, goes_on_after_an_error, tmp_path) == [True, True]


def reads_alone(folder: Path) -> int:
    fabric, model = made()
    fabric.save(folder / "c", {"model": model, "step": 3})
    step = fabric.load(folder / "c")["step"] if fabric.global_rank == 0 else 3
    fabric.teardown()
    return int(step)


def test_what_is_each_ranks_own_needs_nobody(tmp_path: Path) -> None:
    assert run_in_ranks(2, reads_alone, tmp_path) == [3, 3]


def test_torchs_private_names_are_there() -> None:
    assert isinstance(dist.distributed_c10d._world.pg_names, dict)
    assert callable(dist.distributed_c10d._get_default_store)
    assert callable(dist.ProcessGroup._get_sequence_number_for_group)
