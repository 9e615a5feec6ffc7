"""What torchrun's variables mean, and the layouts that follow from them."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import BackendConfig

from precision_core import Fabric
from precision_core.strategies.layout import make_layout
from precision_core.strategies.processes import Ranks, backend_for, bound_device, join, ranks_from_environment
from precision_core.testing import run_in_ranks

FULL = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


def test_torchruns_variables() -> None:
    assert ranks_from_environment(FULL) == Ranks(5, 1, 8, 4)
    assert ranks_from_environment({}) is None
    short = {key: value for key, value in FULL.items() if not key.startswith("LOCAL")}
    assert ranks_from_environment(short) == Ranks(5, 5, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": ""}, "not MASTER_PORT: start with torchrun, or unset RANK, WORLD_SIZE, MASTER_ADDR"),
        ({"RANK": "x"}, "the environment has RANK='x': expected a number"),
        ({"RANK": "8"}, "contradict each other"),
        ({"LOCAL_RANK": "4"}, "contradict each other"),
        ({"LOCAL_WORLD_SIZE": "9"}, "contradict each other"),
    ],
)
def test_variables_that_cannot_be_are_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks_from_environment({**FULL, **changes})


def test_without_torchrun_processes_are_still_to_be_launched() -> None:
    one, two = make_layout("cpu", 1, 1), make_layout("cpu", 2, 1)
    assert one.ranks == Ranks() and one.world_size == 1 and one.device == torch.device("cpu")
    assert two.ranks is None and two.world_size == 2
    assert make_layout("cpu", "auto", 1).world_size == 1 and make_layout("cpu", 2, 3).world_size == 6


def test_under_torchrun_the_layout_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FULL.items():
        monkeypatch.setenv(name, value)
    for devices, nodes in (("auto", 1), (4, 1), (4, 2)):
        layout = make_layout("cpu", devices, nodes)
        assert layout.world_size == 8 and layout.num_nodes == 2 and layout.ranks == Ranks(5, 1, 8, 4)
    for devices, nodes in ((2, 1), (8, 1), (4, 3)):
        with pytest.raises(ValueError, match="4 processes on each of 2 machines"):
            make_layout("cpu", devices, nodes)


@pytest.mark.parametrize("nodes", [0, -1, "2", 1.0, None, True])
def test_num_nodes_is_a_number_of_machines(nodes: object) -> None:
    with pytest.raises(ValueError, match=r"num_nodes=.*expected a number of machines"):
        make_layout("cpu", 1, nodes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "backends"),
    [
        ("cpu", {"cpu": "gloo", "cuda": "gloo"}),
        ("mps", {"cpu": "gloo", "cuda": "gloo"}),
        ("cuda:1", {"cpu": "gloo", "cuda": "nccl"}),
        ("xpu:0", {"cpu": "gloo", "xpu": "xccl"}),
    ],
)
def test_every_run_has_a_backend_for_tensors_on_the_cpu(device: str, backends: dict[str, str]) -> None:
    backend = backend_for(torch.device(device))
    assert backend is not None
    assert BackendConfig(dist.Backend(backend)).device_backend_map == backends
    assert backend_for(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("device", "backend", "binds"),
    [
        ("cuda:1", "cpu:gloo,cuda:nccl", True),
        ("cuda:1", "NCCL", True),
        ("cuda:1", None, True),
        ("cuda", "nccl", False),
        ("cuda:1", "gloo", False),
        ("cuda:1", "cpu:gloo,cuda:gloo", False),
        ("cpu", "gloo", False),
        ("cpu", None, False),
        ("mps:0", "gloo", False),
        ("xpu:0", "cpu:gloo,xpu:xccl", False),
    ],
)
def test_a_device_is_bound_where_the_backend_is_its_own(device: str, backend: str | None, binds: bool) -> None:
    assert bound_device(torch.device(device), backend) == (torch.device(device) if binds else None)


def join_on_the_cpu() -> tuple[str, float]:
    ranks = ranks_from_environment()
    assert ranks is not None
    join(ranks, torch.device("cpu"), None, None)
    tensor = torch.tensor(ranks.rank + 1.0)
    dist.all_reduce(tensor)
    return dist.get_backend_config(), tensor.item()


def test_a_run_on_the_cpu_has_gloo_whatever_torch_finds() -> None:
    assert run_in_ranks(2, join_on_the_cpu) == [("cpu:gloo,cuda:gloo", 3.0)] * 2


def test_nobody_goes_on_before_all_have_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    connect, connected = dist.init_process_group, []

    def slowly(*args: Any, **kwargs: Any) -> None:
        connect(*args, **kwargs)
        time.sleep(0.5 if os.environ["RANK"] == "0" else 0.0)
        connected.append(time.monotonic())

    def joined() -> tuple[float, float]:
        """Returns when this rank has connected, which takes rank zero half a second longer, and when it has joined."""
        fabric = Fabric("cpu")
        now = time.monotonic()
        fabric.teardown()
        return connected[0], now

    monkeypatch.setattr(dist, "init_process_group", slowly)
    (zero, _), (_, others) = run_in_ranks(2, joined)
    assert others >= zero
