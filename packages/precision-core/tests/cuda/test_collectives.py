"""One rank of DDP on a GPU: NCCL for what lies there, and gloo beside it for what lies in CPU memory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD

from precision_core import DDPStrategy, Fabric
from precision_core.strategies.transfer import pack, unpack
from precision_core.testing import needs

pytestmark = [needs("cuda"), pytest.mark.usefixtures("alone")]


class Custom:
    """Any object of a user's."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


def test_each_kind_of_tensor_has_its_backend() -> None:
    fabric = Fabric("gpu", DDPStrategy(), devices=1)
    assert dist.get_backend() == "cpu:gloo,cuda:nccl"
    for device in ("cpu", "cuda"):
        value = torch.tensor([1.0, 2.0], device=device)
        dist.all_reduce(value)
        assert value.tolist() == [1.0, 2.0] and value.device.type == device
        assert fabric.all_reduce(value).device.type == device
        assert fabric.all_gather({"value": value})["value"].shape == (1, 2)
    fabric.barrier()
    fabric.teardown()


def test_a_broadcast_arrives_on_the_device() -> None:
    fabric = Fabric("gpu", DDPStrategy(), devices=1)
    received = fabric.broadcast({"tensor": torch.arange(3), "text": "a"})
    assert received["text"] == "a" and received["tensor"].tolist() == [0, 1, 2]
    assert received["tensor"].device.type == "cuda"
    fabric.teardown()


@pytest.mark.parametrize("mode", ["bf16-true", "bf16-mixed"])
def test_gradients_are_reduced_on_the_device_by_value(mode: str) -> None:
    """`reduce=float32` goes through a hook of ours, whose future has to wait for the GPU's stream."""
    policy = "params=bfloat16,reduce=float32" if mode == "bf16-true" else mode
    fabric = Fabric("gpu", DDPStrategy(), devices=1, precision=policy)
    model = nn.Linear(4, 1, bias=False)
    optimizer = SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        fabric.backward(model(torch.full((1, 4), 0.25, device=fabric.device)).sum())
        assert model.weight.grad is not None and model.weight.grad.tolist() == [[0.25] * 4]
        optimizer.step()
    fabric.teardown()


def test_tensors_in_custom_objects_leave_one_gpu_in_cpu_memory_and_arrive_on_another() -> None:
    """On one rank nothing is received: the way there and back, as two would take it."""
    data = Custom(torch.arange(3, device="cuda"))
    content, tensors = pack(data, torch.device("cuda", 0))
    assert [each[0].device.type for each in tensors] == ["cpu"]
    assert unpack((content, tensors), torch.device("cuda", 0)).value.tolist() == [0, 1, 2]
