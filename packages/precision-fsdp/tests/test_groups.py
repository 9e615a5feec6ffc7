"""Groups: what is gathered together, by default, by the user's choice, and beside it for other casts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from precision_core import Fabric, HalfPrecision, Precision
from precision_core.testing import RankError, run_in_ranks
from precision_fsdp import FSDPPrecision, FSDPStrategy
from precision_fsdp.groups import make_groups
from precision_fsdp.selection import check_selection, repeated_blocks, select


class Block(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.up(self.norm(x))
        for expert in self.experts:
            x = x + expert(x)
        return x


class Other(Block):
    """A kind of block of its own."""


class Net(nn.Module):
    def __init__(self, blocks: int = 3, others: int = 0, experts: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(Block(experts) for _ in range(blocks))
        self.others = nn.ModuleList(Other() for _ in range(others))
        self.head = nn.Linear(4, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in (*self.blocks, *self.others):
            x = block(x)
        return self.head(x)


BLOCKS = [f"blocks.{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: Net(), BLOCKS),
        (lambda: Net(others=2), BLOCKS),  # the longest list
        (lambda: Net(others=3), BLOCKS + [f"others.{i}" for i in range(3)]),
        (lambda: Net(experts=5), BLOCKS),  # not what is in a block
        (lambda: Net(blocks=1), []),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []),
        (lambda: nn.ModuleList([Block(), Block()]), ["0", "1"]),
        (lambda: nn.ModuleDict({"a": Net(), "b": Block()}), [f"a.{name}" for name in BLOCKS] + ["b"]),
    ],
)
def test_the_default_is_the_repeated_block(model: Any, expected: list[str]) -> None:
    assert list(repeated_blocks(model())) == expected


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Block, [*BLOCKS, "others.0", "others.1"]),  # subclasses, too
        ("Block", BLOCKS),
        ([Other, "head"], ["others.0", "others.1", "head"]),
        ("blocks.*", BLOCKS),
        ("*.up", [f"{name}.up" for name in BLOCKS] + ["others.0.up", "others.1.up"]),
        (
            lambda name, module: name.endswith("2.norm") or isinstance(module, nn.Embedding),
            ["embedding", "blocks.2.norm"],
        ),
    ],
)
def test_what_the_user_selects(selection: Any, expected: list[str]) -> None:
    assert list(select("wrap", check_selection("wrap", selection), Net(others=2))) == expected


def test_a_selection_of_nothing_or_of_containers_is_refused() -> None:
    for selection, message in (
        ("block", r"wrap='block'\) matches no module of this Net; did you mean \"Block\"\?"),
        (nn.Conv2d, r"Conv2d'>\) matches no module of this Net"),
        ("blocks", r"blocks is a ModuleList, which has no forward; name what is in it"),
    ):
        with pytest.raises(ValueError, match=message):
            select("wrap", check_selection("wrap", selection), Net())


def groups(model: nn.Module, precision: Precision, wrap: Any = None) -> list[tuple[str, str, list[str]]]:
    """Returns (name, what it is gathered in, its parameters' names) of each group, in the order of sharding."""
    model = precision.convert_module(model)
    blocks = repeated_blocks(model) if wrap is None else select("wrap", check_selection("wrap", wrap), model)
    return [
        (group.name, str(group.casts.gathered), sorted(group.params.values()))
        for group in make_groups(model, blocks, precision)
    ]


def of_block(index: int, *names: str) -> list[str]:
    return [f"blocks.{index}.{name}.{kind}" for name in names for kind in ("bias", "weight")]


ROOT = ["embedding.weight", "head.bias", "head.weight"]


def test_blocks_first_and_the_rest_in_the_root() -> None:
    assert groups(Net(), FSDPPrecision("bf16-mixed")) == [
        *((f"blocks.{i}", "torch.bfloat16", of_block(i, "norm", "up")) for i in range(3)),
        ("", "torch.bfloat16", ROOT),
    ]


def test_exceptions_of_the_policy_are_gathered_beside_their_block() -> None:
    assert groups(Net(), FSDPPrecision("bf16-mixed; *.norm: 32-true; head: 32-true")) == [
        *((f"blocks.{i}", "None", of_block(i, "norm")) for i in range(3)),
        *((f"blocks.{i}", "torch.bfloat16", of_block(i, "up")) for i in range(3)),
        ("", "None", ["head.bias", "head.weight"]),
        ("", "torch.bfloat16", ["embedding.weight"]),
    ]


def test_nested_blocks_are_sharded_before_what_is_around_them() -> None:
    found = groups(Net(blocks=1), FSDPPrecision("32-true"), wrap=["Block", "*.up"])
    assert [name for name, _, _ in found] == ["blocks.0.up", "blocks.0", ""]


def test_a_block_that_is_called_twice_is_one_group() -> None:
    model = Net(blocks=1)
    model.blocks.append(model.blocks[0])
    assert [(name, len(params)) for name, _, params in groups(model, FSDPPrecision())] == [("blocks.0", 4), ("", 3)]


def test_parameters_tied_across_groups_are_refused_with_both_names() -> None:
    model = Net()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    with pytest.raises(
        ValueError, match=r"blocks\.0\.up\.weight and blocks\.1\.up\.weight are one tied parameter in two "
    ):
        groups(model, FSDPPrecision())
    assert len(groups(model, FSDPPrecision(), wrap="head")) == 2  # both in the root: fine
    model = Net()
    model.head.weight = model.embedding.weight
    assert len(groups(model, FSDPPrecision("bf16-mixed"))) == 4
    with pytest.raises(ValueError, match="name both in exceptions of the policy, or neither"):
        groups(model, FSDPPrecision("bf16-mixed; head: 32-true"))


# -------------------------------------------------------------------- on ranks


def exceptions() -> tuple[dict[str, str], dict[str, str], float, str]:
    model = Net()
    weight = 1.0 + 2.0**-12  # no bfloat16
    nn.init.constant_(model.blocks[0].norm.weight, weight)
    fabric = Fabric(accelerator="cpu", strategy="fsdp", precision="bf16-mixed; *.norm: 32-true")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    seen: dict[str, str] = {}
    exact: list[float] = []
    for name in ("norm", "up"):
        layer = getattr(model.blocks[0], name)
        layer.register_forward_pre_hook(lambda layer, _, name=name: seen.update({name: str(layer.weight.dtype)}))
    model.blocks[0].norm.register_forward_pre_hook(lambda layer, _: exact.append(layer.weight[0].item()))
    for _ in range(2):
        optimizer.zero_grad()
        fabric.backward(model(torch.arange(8)).pow(2).mean())
        optimizer.step()
    gradients = {name: str(param.grad.dtype) for name, param in model.named_parameters()}  # type: ignore[union-attr]
    return seen, gradients, exact[0] - weight, str(fabric.precision_plugin.report)


def test_an_explicit_exception_keeps_norms_exact_in_a_group_beside() -> None:
    for seen, gradients, off, report in run_in_ranks(2, exceptions):
        assert seen == {"norm": "torch.float32", "up": "torch.bfloat16"}
        assert set(gradients.values()) == {"torch.float32"} and off == 0.0
        assert "blocks.0.norm in a group beside blocks.0's own, gathered in float32" in report


class Packed(nn.Module):
    """A linear layer whose weight is stored in a byte an element, as quantised layers have it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randint(0, 3, (5, 4)).float().to(dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(5))
        self.seen: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = [str(self.weight.dtype)]
        return nn.functional.linear(x, self.weight.to(x.dtype)) + self.bias


class WithPacked(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), Packed(dtype), nn.Linear(5, 4)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def packed(mode: str, dtype: torch.dtype) -> tuple[list[str], bool, bool, list[float]]:
    model: Any = WithPacked(dtype)
    before = model.blocks[0][1].weight.detach().clone().view(torch.uint8)
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(wrap="blocks.*"), precision=mode)
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.01)
    fabric.setup(model, optimizer)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 4)) - 1).pow(2).mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    weight = model.blocks[0][1].weight
    assert isinstance(weight, DTensor)
    shard = weight.to_local().view(torch.uint8)
    return model.blocks[0][1].seen, torch.equal(shard, before.chunk(2)[fabric.global_rank]), len(shard) < 5, losses


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("mode", ["bf16-mixed", "bf16-true"])
def test_packed_weights_are_sharded_as_they_are_and_never_cast(mode: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point and torch.__version__ < (2, 10):
        with pytest.raises(RankError, match=r"ValueError: torch 2.9.* cannot shard parameters of integers: blocks.0.1"):
            run_in_ranks(2, packed, mode, dtype)
        return
    for seen, is_same, is_shard, losses in run_in_ranks(2, packed, mode, dtype):
        assert seen == [str(dtype)] and is_same and is_shard
        assert losses[-1] < losses[0]


def wide_statistics() -> tuple[str, str]:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    precision = HalfPrecision("bf16-true", buffers="float32")
    fabric = Fabric(accelerator="cpu", strategy="fsdp", precision=precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    fabric.backward(model(torch.randn(8, 4)).pow(2).mean())
    optimizer.step()
    return str(model[0].weight.dtype), str(model[1].weight.dtype)


def test_batch_norms_that_a_plugin_keeps_wide_have_a_group_of_their_own() -> None:
    assert run_in_ranks(2, wide_statistics) == [("torch.bfloat16", "torch.float32")] * 2
