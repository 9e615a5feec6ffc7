"""Ranks: what is said of one that ends without a result, and what kept ones take over, clean up and do not share."""

from __future__ import annotations

import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from precision_core import Fabric
from precision_core.testing import forks
from precision_core.testing.ranks import POOLS, RankError, run_in_ranks


def test_a_rank_that_was_killed_names_the_signal() -> None:
    with pytest.raises(
        RankError, match=f"rank 0 of 1:\nit died without a traceback: exit code -{int(signal.SIGKILL)},"
    ):
        run_in_ranks(1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_result_that_does_not_pickle_is_named() -> None:
    with pytest.raises(RankError, match="pickle"):
        run_in_ranks(1, lambda: lambda: None)


def test_a_process_with_a_group_is_not_forked() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="this process has a process group"):
            run_in_ranks(1, os.getpid)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def kept() -> Iterator[None]:
    """Ranks that are kept, for this test alone."""
    before = POOLS.key
    POOLS.choose("test_ranks")
    yield
    POOLS.close()
    POOLS.choose(before)


def process() -> int:
    return os.getpid()


def train_in_a_cycle() -> int:
    """Takes steps of torch's DDP, and leaves it to the garbage collector, right after its last collective."""
    dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
    model.itself = [model]  # type: ignore[assignment]
    return os.getpid()


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("cleanups", [[], [dist.destroy_process_group]], ids=["ours", "a vendor's"])
def test_they_clean_up_a_group_whose_threads_are_at_work(
    cleanups: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "CLEANUPS", cleanups)
    first = run_in_ranks(2, train_in_a_cycle)
    for _ in range(20):  # every tenth of these hung, some 20 seconds, and the ranks were given up
        assert run_in_ranks(2, train_in_a_cycle) == first


@pytest.mark.usefixtures("kept")
def test_kept_ranks_run_one_function_after_another() -> None:
    first = run_in_ranks(2, process)
    assert run_in_ranks(2, process) == first and os.getpid() not in first
    assert set(run_in_ranks(3, process)).isdisjoint(first)
    assert run_in_ranks(2, process) == first  # those of another number are kept beside them
    assert set(run_in_ranks(2, lambda: os.getpid())).isdisjoint(first)  # a closure gets fresh ones
    assert run_in_ranks(2, process) == first


def fails(rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        raise ValueError("it fails")
    Fabric(accelerator="cpu", strategy="ddp", devices=2).setup(torch.nn.Linear(1, 1))  # waits for the other


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.usefixtures("kept")
def test_after_a_failure_they_are_new(rank: int) -> None:
    first = run_in_ranks(2, process)
    with pytest.raises(RankError, match=rf"rank {rank} of 2:\nTraceback(.*\n)+ValueError: it fails"):
        run_in_ranks(2, fails, rank)
    assert set(run_in_ranks(2, process)).isdisjoint(first)


def litter() -> int:
    os.environ["LITTER"] = "1"
    os.environ.pop("HOME", None)
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    fabric.setup(torch.nn.Linear(1, 1))
    return dist.get_world_size()


def look() -> dict[str, object]:
    with pytest.raises(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)
    return {
        "litter": os.environ.get("LITTER"),
        "home": os.environ.get("HOME"),
        "folder": os.getcwd(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "group": dist.is_initialized(),
        "drawn": (torch.rand(1).item(), random.random()),
    }


@pytest.mark.usefixtures("kept")
def test_what_a_function_leaves_is_cleaned_up() -> None:
    torch.manual_seed(7)
    random.seed(7)
    fresh = run_in_ranks(2, lambda: look())
    assert run_in_ranks(2, litter) == [2, 2]
    assert run_in_ranks(2, look) == fresh
    assert fresh[0]["drawn"] == fresh[1]["drawn"] == (torch.rand(1).item(), random.random())


def says(name: str) -> str | None:
    return os.environ.get(name)


@pytest.mark.usefixtures("kept")
def test_they_follow_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_in_ranks(1, says, "SAID_LATER") == [None]
    monkeypatch.setenv("SAID_LATER", "yes")
    assert run_in_ranks(1, says, "SAID_LATER") == ["yes"]
    assert run_in_ranks(2, says, "WORLD_SIZE") == ["2", "2"]
    assert run_in_ranks(3, says, "RANK") == ["0", "1", "2"]


def compute() -> None:
    total = 0
    for number in range(10_000_000):
        total += number


@pytest.mark.usefixtures("kept")
def test_what_they_compute_is_counted_once() -> None:
    def spent() -> float:
        times = os.times()
        return times.children_user + times.children_system + POOLS.cpu_seconds

    before = spent()
    run_in_ranks(2, compute)
    computed = spent() - before
    assert computed > 0.1
    POOLS.close()
    assert spent() - before == pytest.approx(computed, rel=0.6)  # what they took to start is in the children's times
