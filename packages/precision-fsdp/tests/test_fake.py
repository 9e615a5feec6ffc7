"""A model without values is sharded as any other: what each process would hold, before anything is allocated."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_fsdp.fake import is_fake


def shard_a_fake_model(mode: str) -> tuple[list[tuple[int, ...]], set[torch.dtype], list[tuple[int, ...]]]:
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=8)
    fabric = Fabric("cpu", strategy="fsdp", precision=mode)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.Sequential(nn.Linear(400_000, 80_000, bias=False), nn.Linear(80_000, 4))  # 128 GB
        vars(model)["to"] = lambda *args, **kwargs: model.type(kwargs.get("dtype", torch.float32))
        optimizer = torch.optim.AdamW(model.parameters())
        model, optimizer = fabric.setup(model, optimizer)
        assert all(is_fake(param.to_local()) for param in model.parameters())  # type: ignore[attr-defined]
        fabric.backward(model(torch.ones(2, 400_000)).sum())
        optimizer.step()
        params = list(model.parameters())
        shapes = [tuple(param.to_local().shape) for param in params]  # type: ignore[attr-defined]
        states = [tuple(optimizer.state[param]["exp_avg"].to_local().shape) for param in params]
        return shapes, {param.dtype for param in params}, states


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed"])
def test_each_process_has_its_shards_of_a_model_larger_than_memory(mode: str) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}

    def alone() -> tuple[list[tuple[int, ...]], set[torch.dtype], list[tuple[int, ...]]]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return shard_a_fake_model(mode)

    ((shapes, dtypes, states),) = run_in_ranks(1, alone)
    assert shapes == states == [(10_000, 400_000), (1, 80_000), (1,)]
    assert dtypes == {torch.float32}


def test_a_real_tensor_has_values() -> None:
    assert not is_fake(torch.ones(1)) and not is_fake(nn.Parameter(torch.ones(1)))
