"""Numbers are read as they were when they were taken; of a tensor that is spread over ranks there is none."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from precision_lab.watching.values import Copies, Value, whole


def test_a_number() -> None:
    tensor = torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True)
    value = Value(tensor)
    with torch.no_grad():
        tensor.mul_(2)
    assert value.ready and value.read() == 1.5 and Value(2.0).read() == 2.0


def test_tensors() -> None:
    copies = Copies([torch.ones(2), torch.zeros(1)])
    assert copies.ready and [each.tolist() for each in copies.read()] == [[1.0, 1.0], [0.0]]


def test_what_this_rank_has_all_of() -> None:
    assert whole(torch.ones(2)) is None and whole(torch.ones(1, 1)) is not None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        found = whole(DTensor.from_local(torch.tensor(3.0), mesh, [Replicate()]))
        assert type(found) is torch.Tensor and found.item() == 3.0
        assert whole(DTensor.from_local(torch.tensor(3.0), mesh, [Partial()])) is None
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_number_on_a_gpu_is_copied() -> None:
    tensor = torch.tensor(1.5, device="cuda")
    value = Value(tensor)
    tensor.mul_(2)
    assert value.read() == 1.5 and value.ready
