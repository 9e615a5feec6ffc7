"""Models built on meta: the values that they would have had whole, in shards, or an error that names what has none."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from precision_core import MODES, Fabric
from precision_core.testing import run_in_ranks
from precision_fsdp import FSDPStrategy, materialise


class Block(nn.Module):
    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.up = nn.Linear(6, 5)  # 5 rows do not divide by two or three ranks
        self.down = nn.Linear(5, 6)
        self.scale = nn.Parameter(torch.empty(6))
        self.register_buffer("table", torch.empty(6), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale)
        self.table = torch.arange(6) / 5 + 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x))) * self.scale + self.table


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def whole(mode: str) -> dict[str, torch.Tensor]:
    """Ordinary construction in one process."""
    torch.manual_seed(5)
    with Fabric(accelerator="cpu", precision=mode).init_module():
        model = Net()
    model = Fabric(accelerator="cpu", precision=mode).setup(model)
    return values(model)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {
        name: (each.full_tensor() if isinstance(each, DTensor) else each).detach().clone() for name, each in tensors
    }


def sharded(mode: str) -> tuple[dict[str, torch.Tensor], list[float], bool, bool]:
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(wrap=Block), precision=mode)
    with fabric.init_module():
        model = Net()
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(5 + fabric.global_rank)  # rank zero's numbers are everybody's
    own = torch.get_rng_state()
    fabric.setup(model, optimizer)
    is_back = torch.equal(torch.get_rng_state(), own)
    found, tied = values(model), model.head.weight is model.embedding.weight
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.arange(7)), torch.arange(7).flip(0))
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return found, losses, tied, is_back


@pytest.mark.filterwarnings("ignore:.*casts buffers to:UserWarning")
@pytest.mark.parametrize(("mode", "ranks"), [("32-true", 2), ("32-true", 3), ("bf16-mixed", 2), ("bf16-true", 2)])
def test_values_equal_those_of_ordinary_construction_in_one_process(mode: str, ranks: int) -> None:
    expected = whole(mode)
    for rank, (found, losses, tied, is_back) in enumerate(run_in_ranks(ranks, sharded, mode)):
        assert found.keys() == expected.keys() and tied
        for name, value in expected.items():
            assert found[name].dtype is value.dtype and torch.equal(found[name], value), name
        assert losses[-1] < losses[0]
        assert is_back == (rank > 0)  # rank zero's generator has moved on, as it would have in one process


def two_models() -> list[float]:
    fabric = Fabric(accelerator="cpu", strategy="fsdp")
    sums = []
    for _ in range(2):
        with fabric.init_module():
            model = nn.Linear(3, 3)
        sums.append(fabric.setup(model).weight.full_tensor().sum().item())  # type: ignore[operator]
    return sums


def test_a_second_model_gets_other_values_on_all_ranks() -> None:
    first, second = run_in_ranks(2, two_models)
    assert first == second and first[0] != first[1]


class Small(nn.Module):
    """Holds nothing itself, and sets its child's values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.layer.weight, 0.25)
        nn.init.normal_(self.layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def of_parents() -> dict[str, torch.Tensor]:
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(wrap=Small))
    with fabric.init_module():
        model = nn.Sequential(Small(), nn.MultiheadAttention(4, 2), Small())
    torch.manual_seed(2)
    return values(fabric.setup(model))


def test_what_a_module_does_to_its_children_holds() -> None:
    torch.manual_seed(2)
    expected = values(nn.Sequential(Small(), nn.MultiheadAttention(4, 2), Small()))
    assert expected["1.out_proj.bias"].abs().max() == 0.0
    for found in run_in_ranks(2, of_parents):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def in_part_with_values() -> tuple[float, float, bool]:
    fabric = Fabric(accelerator="cpu", strategy="fsdp")
    with fabric.init_module():
        model, part = Small(), Small()
    model.layer = nn.Linear(3, 3)
    nn.init.constant_(model.layer.weight, 7.0)
    model.other = part  # on meta
    part.layer.weight = nn.Parameter(torch.full((3, 3), 5.0))
    found = values(fabric.setup(model))
    bias = found["other.layer.bias"]
    return found["layer.weight"].min().item(), found["other.layer.weight"].min().item(), bool(bias.isfinite().all())


def test_what_has_values_keeps_them() -> None:
    assert run_in_ranks(2, in_part_with_values) == [(7.0, 5.0, True)] * 2


def off_the_device() -> tuple[list[str], dict[str, torch.Tensor], str]:
    """Shards of a mesh whose device is not the CPU, which they stay on: meta stands for an accelerator."""
    dist.init_process_group("gloo")
    mesh = DeviceMesh("meta", torch.arange(2), mesh_dim_names=("shard",))
    with torch.device("meta"):
        model = nn.Linear(4, 5)  # 5 rows over two ranks
        model.register_buffer("table", torch.ones(3))
    for key, param in [*model.named_parameters()]:
        local = param.detach().chunk(2)[dist.get_rank()]
        sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=param.shape, stride=param.stride())
        setattr(model, key, nn.Parameter(sharded))

    def fill(module: Any) -> None:
        nn.init.normal_(module.weight), nn.init.normal_(module.bias)
        module.table = torch.ones(3)

    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(materialise, "_random_numbers_of_rank_zero", lambda device: nullcontext())
        materialise.materialise(model, fill, torch.device("meta"), offload=True)
    shards = {name: param.to_local().detach() for name, param in model.named_parameters()}  # type: ignore[attr-defined]
    return [str(each.device) for each in shards.values()], shards, str(model.table.device)


def test_offloaded_shards_are_cut_on_the_cpu_and_never_go_to_the_device() -> None:
    torch.manual_seed(3)
    weight, bias = torch.empty(5, 4).normal_(), torch.empty(5).normal_()
    for rank, (devices, shards, table) in enumerate(run_in_ranks(2, off_the_device)):
        assert devices == ["cpu", "cpu"] and table == "meta"  # buffers are where forward runs
        assert torch.equal(shards["weight"], weight.chunk(2)[rank]) and torch.equal(shards["bias"], bias.chunk(2)[rank])


# -------------------------------------------------------------------- the user's own, and nobody's


class Bare(nn.Module):
    """Sets its values in its constructor, as most code does: on meta they come to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("steps", torch.arange(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale


def bare(init_fn: Any) -> Any:
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(init_fn=init_fn))
    with fabric.init_module():
        model = Bare()
    try:
        fabric.setup(model)
    except ValueError as error:
        return str(error)
    return values(model)


def by_hand(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data.fill_(2.0)  # .data, as in transformers
        nn.init.zeros_(module.bias)
    if isinstance(module, Bare):
        nn.init.ones_(module.scale)
        module.steps = torch.arange(4)


def in_part(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.ones_(module.weight)


def test_what_nothing_initialises_is_an_error_that_names_it() -> None:
    for message in run_in_ranks(2, bare, None):
        assert message.startswith("nothing initialises scale, steps: give their modules a reset_parameters() that sets")
    for message in run_in_ranks(2, bare, in_part):
        assert message.startswith("nothing initialises layer.bias, scale, steps: ")


def test_the_users_function_is_called_for_each_module() -> None:
    for found in run_in_ranks(2, bare, by_hand):
        expected = {"scale": torch.ones(2), "layer.weight": torch.full((2, 2), 2.0), "layer.bias": torch.zeros(2)}
        expected["steps"] = torch.arange(4)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_one_process_builds_on_meta_too() -> None:
    torch.manual_seed(5)
    expected = whole("64-true")
    found = run_in_ranks(1, sharded, "64-true")[0][0]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert MODES["64-true"].params is found["head.weight"].dtype
