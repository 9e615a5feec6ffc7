"""grads=float32 under FSDP2: shards of gradients are float32, summed and averaged in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.distributed.fsdp import MixedPrecision, fully_shard

from precision_core import Fabric, Policy
from precision_core.testing import run_in_ranks
from precision_fsdp import FSDPPrecision, FSDPStrategy
from precision_fsdp.unsynced import groups_of
from precision_fsdp.wide_gradients import keep_wide

pytestmark = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.10 brought grad_dtype")
MASTER = "params=bfloat16,master=float32,grads=float32"


def torch_alone() -> tuple[torch.dtype, torch.dtype]:
    """Returns the dtype of a gradient whose parameter said float32 before it was sharded, and the attribute's name."""
    torch.distributed.init_process_group("gloo")
    layer = nn.Linear(4, 2, bias=False, dtype=torch.bfloat16)
    layer.weight.grad_dtype = torch.float32
    fully_shard(layer)
    layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad.dtype, next(groups_of(layer))._orig_dtype


def test_torchs_own_fsdp_narrows_them() -> None:
    """Why this module is there, and by which name of torch's it works."""
    assert run_in_ranks(2, torch_alone) == [(torch.bfloat16, torch.bfloat16)] * 2


def accumulated(precision: str, options: dict[str, Any], unsynced: bool, rounds: int) -> list[Tensor]:
    """Returns the gradients of two microbatches after each round: 256 and 1, of rank 1 five times that."""
    fabric = Fabric("cpu", devices=2, strategy=FSDPStrategy(**options), precision=precision)
    model = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Identity())
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    found = []
    for step in range(rounds):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for value in (256.0, 1.0):
            with fabric.no_backward_sync(model, enabled=unsynced and value == 256):
                fabric.backward(model(torch.full((1, 64), value * (1 + 4 * fabric.global_rank))).sum())
        found.append(model[0].weight.grad.full_tensor())  # type: ignore[union-attr,operator]
    fabric.clip_gradients(model, optimizer, max_norm=1e9)
    optimizer.step()
    group = next(groups_of(model))
    assert group._orig_dtype is (torch.float32 if "grads" in precision else torch.bfloat16)
    fabric.teardown()
    assert group._orig_dtype is torch.bfloat16
    return found


@pytest.mark.parametrize("unsynced", [True, False], ids=["one reduction", "two reductions"])
def test_256_and_1_are_257_on_two_ranks(unsynced: bool) -> None:
    for gradients in run_in_ranks(2, accumulated, MASTER, {}, unsynced, 2):
        for gradient in gradients:
            assert gradient.dtype is torch.float32 and gradient.eq(3 * 257).all()


def test_without_it_they_are_rounded() -> None:
    """The negative control: bfloat16 has 768 and 772 for 771."""
    for unsynced in (True, False):
        for gradients in run_in_ranks(2, accumulated, "bf16-master", {}, unsynced, 1):
            assert gradients[0].dtype is torch.bfloat16 and not gradients[0].float().eq(3 * 257).any()


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def train(policy: str) -> tuple[bool, list[Tensor]]:
    """Returns whether each step is float32's on the same shards and gradients, and the full values after all."""
    fabric = Fabric("cpu", devices=2, strategy=FSDPStrategy(), precision=policy)
    model = Net(fabric.global_rank)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    fabric.setup(model, optimizer)
    masters = fabric.precision_plugin.masters
    local = [masters.value(param).to_local() for param in model.parameters()]  # type: ignore[attr-defined]
    reference = [nn.Parameter(each.clone()) for each in local]
    plain, alike = optim.AdamW(reference, lr=1e-3), True
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(2):
            generator = torch.Generator().manual_seed(10 * step + micro + 100 * fabric.global_rank)
            with fabric.no_backward_sync(model, enabled=micro == 0):
                fabric.backward(model(torch.randn(4, 5, generator=generator)).square().mean())
        for param, mine in zip(reference, model.parameters(), strict=True):
            assert mine.grad is not None and mine.grad.dtype is torch.float32
            param.grad = mine.grad.to_local()  # type: ignore[attr-defined]
        optimizer.step()
        plain.step()
        values = [masters.value(param) for param in model.parameters()]
        alike &= all(torch.equal(a.to_local(), b) for a, b in zip(values, reference, strict=True))  # type: ignore[attr-defined]
    return alike, [value.full_tensor() for value in values]  # type: ignore[attr-defined]


@pytest.mark.parametrize("policy", [MASTER, pytest.param(f"{MASTER}; norm: 32-true", marks=pytest.mark.full)])
def test_any_optimizer_steps_them_as_float32_does(policy: str) -> None:
    (first, mine), (second, theirs) = run_in_ranks(2, train, policy)
    assert first and second and all(map(torch.equal, mine, theirs))


def test_a_narrower_reduction_is_refused_with_the_reason() -> None:
    narrow = FSDPPrecision(f"{MASTER},reduce=bfloat16")
    assert "so grads=float32 needs reduce=float32" in str(FSDPStrategy().refuses(narrow))
    given = FSDPStrategy(MixedPrecision(reduce_dtype=torch.bfloat16))
    assert "so grads=float32 needs reduce=float32" in str(given.refuses(FSDPPrecision(MASTER)))
    assert FSDPStrategy().refuses(FSDPPrecision(MASTER)) is None and FSDPPrecision(MASTER).refuses(given) is None
    given.keeps_wide_gradients = False  # another engine, say
    assert "its engine keeps no gradients wider" in str(FSDPPrecision(MASTER).refuses(given))


def without_the_name() -> str:
    torch.distributed.init_process_group("gloo")
    layer = nn.Linear(4, 2, bias=False, dtype=torch.bfloat16)
    fully_shard(layer)
    for group in groups_of(layer):
        vars(group).pop("_orig_dtype", None)
    with pytest.raises(RuntimeError) as error:
        list(keep_wide(layer, Policy.parse(MASTER)))
    return str(error.value)


def test_a_torch_that_renames_it_is_an_error() -> None:
    for message in run_in_ranks(1, without_the_name):
        assert "FSDPParamGroup._orig_dtype, a private name" in message and "leave grads=float32 out" in message
