"""What is sent at the start: rank zero's values where ranks differ, and nothing where they are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_fsdp import start
from precision_fsdp.materialise import materialise


def sent_in(seed: int, other_at: str | None) -> tuple[int, list[float]]:
    """Returns how many bytes were broadcast at setup, and the sums of all tensors after it."""
    fabric = Fabric("cpu", strategy="fsdp", precision="32-true")
    torch.manual_seed(seed + (fabric.global_rank if other_at == "everywhere" else 0))
    model = nn.Sequential(nn.Linear(33, 17), nn.BatchNorm1d(17), nn.Linear(17, 3, bias=False))
    model.register_buffer("views", torch.arange(6.0).view(2, 3).t())
    model.register_buffer("same", torch.ones(1).expand(9))
    if fabric.global_rank == 1 and other_at not in (None, "everywhere"):
        tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[other_at]
        with torch.no_grad():
            (tensor[:1] if tensor.ndim else tensor).add_(1)
    total, broadcast = 0, dist.broadcast

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return broadcast(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast", counted)
        model = fabric.setup(model)
    tensors = (*model.parameters(), *model.buffers())
    return total, [getattr(each, "full_tensor", lambda each=each: each)().double().sum().item() for each in tensors]


SIZES = {"0.weight": 33 * 17 * 4, "1.bias": 17 * 4, "1.num_batches_tracked": 8, "views": 24, "same": 4}


@pytest.mark.parametrize("name", [None, *SIZES])
def test_only_what_differs_is_sent(name: str | None) -> None:
    (total, sums), (other_total, other_sums) = run_in_ranks(3 if name == "1.bias" else 2, sent_in, 5, name)[:2]
    assert total == other_total == SIZES.get(str(name), 0) and sums == other_sums


def test_ranks_with_other_seeds_get_all_of_rank_zeros() -> None:
    (total, sums), (_, others) = run_in_ranks(2, sent_in, 5, "everywhere")
    assert sums == others and total == (33 * 17 + 17 + 17 * 3) * 4


@pytest.mark.parametrize("way", [start._hash_of_cpu, start._hash_on_device])
def test_equal_contents_alone_have_equal_hashes(
    way: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashed(content: Tensor) -> tuple[int, int]:
        one, two = way(content).tolist()
        return one, two

    base = torch.zeros(37, dtype=torch.uint8)
    contents = [
        base,
        *(base.clone().index_fill_(0, torch.tensor(place), value) for place in range(37) for value in (1, 255)),
    ]
    swapped = torch.arange(37, dtype=torch.uint8)
    contents += [swapped, swapped.flip(0), swapped.roll(8), swapped.roll(16), torch.ones(36, dtype=torch.uint8)]
    found = [hashed(each) for each in contents]
    assert len({one for one, _ in found}) == len({two for _, two in found}) == len(contents)
    assert hashed(swapped) == hashed(swapped.clone()) == hashed(torch.cat([base[:3], swapped])[3:])
    monkeypatch.setattr(start, "_CHUNK", 2)
    assert [hashed(each) for each in contents] == found


class SeenError(Exception):
    pass


def test_random_numbers_go_through_the_device_that_the_group_sends_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of nccl alone takes no tensors of the CPU; meta stands for its device."""

    def broadcast(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        raise SeenError(tensor.device.type)

    monkeypatch.setattr(dist, "broadcast", broadcast)
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    for offload in (False, True):
        with pytest.raises(SeenError, match=r"^meta$"):
            materialise(model, None, torch.device("meta"), offload=offload)
