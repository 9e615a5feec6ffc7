import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from precision_core.testing import run_in_ranks
from precision_lab.pretended import pretended


def test_the_process_is_one_of_several_and_is_alone_again_after_an_error(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29400")
    with pytest.raises(RuntimeError, match="mine"), pretended(8):
        assert (dist.get_rank(), dist.get_world_size(), os.environ["WORLD_SIZE"]) == (0, 8, "8")
        gathered = [torch.zeros(2) for _ in range(8)]
        dist.all_gather(gathered, torch.ones(2))  # nobody answers, and nobody waits
        raise RuntimeError("mine")
    assert not dist.is_initialized()
    assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ and os.environ["MASTER_PORT"] == "29400"


def test_one_of_a_run_cannot_pretend(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="one of a run already"), pretended(8):
        pass
    assert os.environ["RANK"] == "1" and not dist.is_initialized()


def shard_of_zeros_like():
    """What an operation on a sharded tensor returns is this rank's shard."""
    mesh = init_device_mesh("cpu", (2,))
    made = torch.zeros_like(distribute_tensor(torch.arange(6.0), mesh, [Shard(0)]))
    return made.device_mesh.get_coordinate()


def test_what_torch_keeps_of_shardings_is_that_of_no_later_run():
    with pretended(2):
        assert shard_of_zeros_like() == (0,)
    assert run_in_ranks(2, shard_of_zeros_like) == [(0,), (1,)]
