"""grads=float32 under DDP: gradients are added up and averaged in float32, whatever torch's buckets hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from precision_core import DDPStrategy, Fabric, HalfPrecision
from precision_core.testing import run_in_ranks

needs_torch = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.10 brought grad_dtype")
MASTER = "params=bfloat16,master=float32,grads=float32"
SIZES = (64, 8)


class Net(nn.Module):
    """Two layers, one of which may be left out, and a float32 norm of the user's where the policy has an exception."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(SIZES[0], SIZES[1])
        self.side = nn.Linear(SIZES[0], SIZES[1], bias=False)
        self.norm = nn.LayerNorm(SIZES[1])

    def forward(self, x: Tensor, side: bool = True) -> Tensor:
        y = self.first(x)
        return self.norm(y + self.side(x) if side else y)


def torch_alone() -> str:
    """Returns what torch's own DDP says of a parameter whose gradient is wider."""
    dist.init_process_group("gloo")
    layer = nn.Linear(4, 2, bias=False, dtype=torch.bfloat16)
    layer.weight.grad_dtype = torch.float32
    engine = DistributedDataParallel(layer)
    try:
        engine(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


@needs_torch
def test_torchs_own_ddp_raises() -> None:
    """Why this module is there. The day that this fails, DDP reduces them by itself."""
    assert run_in_ranks(2, torch_alone) == ["Expected BFloat16, got Float"] * 2


def two_hundred_and_fifty_seven(
    precision: str, options: dict[str, Any], by_hand: bool = False, rounds: int = 1
) -> list[Tensor]:
    """Returns the gradients of two microbatches after each round: 256 and 1, of rank 1 five times that."""
    fabric = Fabric("cpu", devices=2, strategy=DDPStrategy(**options), precision=precision)
    model = nn.Linear(SIZES[0], 2, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    found = []
    if options.get("static_graph"):  # torch's own does not begin with a backward that it does not reduce
        fabric.backward(model(torch.ones(1, SIZES[0])).sum())
    for _ in range(rounds):
        optimizer.zero_grad()
        for value in (256.0, 1.0):
            with fabric.no_backward_sync(model, enabled=value == 256):
                loss = model(torch.full((1, SIZES[0]), value * (1 + 4 * fabric.global_rank))).sum()
                loss.backward() if by_hand else fabric.backward(loss)
        assert model.weight.grad is not None
        found.append(model.weight.grad.clone())
    fabric.teardown()
    return found


@needs_torch
@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({}, False),
        ({}, True),
        ({"find_unused_parameters": True}, False),
        ({"static_graph": True}, False),
        pytest.param({"static_graph": True}, True, marks=pytest.mark.full),
        pytest.param({"bucket_cap_mb": 1e-4}, False, marks=pytest.mark.full),
    ],
)
def test_256_and_1_are_257_on_two_ranks(options: dict[str, Any], by_hand: bool) -> None:
    for gradients in run_in_ranks(2, two_hundred_and_fifty_seven, MASTER, options, by_hand, 3):
        for gradient in gradients:
            assert gradient.dtype is torch.float32 and gradient.eq(3 * 257).all()


def test_without_it_they_are_256() -> None:
    """The negative control: bfloat16 adds 1 to 256, and 5 to 1280, and has 256 and 1288."""
    for gradients in run_in_ranks(2, two_hundred_and_fifty_seven, "bf16-master", {}):
        assert gradients[0].eq((256 + 1288) / 2).all()


@needs_torch
def test_reduce_says_what_they_are_averaged_in() -> None:
    spelled = f"{MASTER},reduce=bfloat16"  # 257 is sent as 256, 1285 as 1288
    for gradients in run_in_ranks(2, two_hundred_and_fifty_seven, spelled, {}):
        assert gradients[0].dtype is torch.float32 and gradients[0].eq(772).all()


USES: dict[str, Callable[[int, int], bool]] = {  # whether the side layer is in a forward, by microbatch and rank
    "in all": lambda micro, rank: True,
    "in one, another on each rank": lambda micro, rank: micro + rank == 2,
    "in none that is reduced": lambda micro, rank: micro == 1 and rank == 0,
    "in none": lambda micro, rank: False,
}


def train(precision: str, used: str) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Returns gradients by name after each step's backwards, and float32 values after all."""
    strategy = DDPStrategy(find_unused_parameters=used != "in all")
    fabric = Fabric("cpu", devices=2, strategy=strategy, precision=precision)
    model = Net(fabric.global_rank)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    fabric.setup(model, optimizer)
    seen = []
    for step in range(4):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for micro in range(3):
            generator = torch.Generator().manual_seed(100 * step + 10 * micro + fabric.global_rank)
            x = torch.randn(4, SIZES[0], generator=generator)
            uses = USES[used](micro, fabric.global_rank)
            with fabric.no_backward_sync(model, enabled=micro < 2):
                fabric.backward(model(x, uses).square().mean())
        seen.append({name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None})
        fabric.clip_gradients(model, optimizer, max_norm=1e9)
        optimizer.step()
    values = [fabric.precision_plugin.masters.value(param) for param in model.parameters()]
    fabric.teardown()
    return seen, values


def by_hand(uses: Callable[[int, int], bool]) -> dict[str, Tensor]:
    """Returns the gradients of the first step, each microbatch's in bfloat16, added and averaged in float64."""
    model = Net()
    precision = HalfPrecision("bf16-true; norm: 32-true")
    precision.convert_module(model)
    total = {name: torch.zeros_like(param, dtype=torch.float64) for name, param in model.named_parameters()}
    for rank in range(2):
        for micro in range(3):
            model.zero_grad()
            x = torch.randn(4, SIZES[0], generator=torch.Generator().manual_seed(10 * micro + rank))
            with precision.forward_context():
                output = precision.convert_output(model(precision.convert_input(x), uses(micro, rank)))
            output.square().mean().backward()
            for name, param in model.named_parameters():
                total[name] += 0 if param.grad is None else param.grad.double() / 2
    return {name: gradient for name, gradient in total.items() if gradient.any()}


@needs_torch
@pytest.mark.parametrize("used", [*list(USES)[:3], pytest.param("in none", marks=pytest.mark.full)])
def test_they_are_the_sum_of_what_backwards_compute(used: str) -> None:
    expected = by_hand(USES[used])
    ranks = run_in_ranks(2, train, f"{MASTER}; norm: 32-true", used)
    for seen, values in ranks:
        assert all(torch.equal(a, b) for a, b in zip(values, ranks[0][1], strict=True))
        assert all(gradient.dtype is torch.float32 for each in seen for gradient in each.values())
        for name, gradient in seen[0].items():
            assert (gradient.double() - expected[name]).norm() <= 1e-6 * expected[name].norm(), name
        assert seen[0].keys() == expected.keys()


def after_an_error() -> Tensor:
    """Returns the gradient of a step after one whose backward raised."""
    fabric = Fabric("cpu", devices=2, strategy=DDPStrategy(find_unused_parameters=True), precision=MASTER)
    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    x = torch.ones(2, SIZES[0])
    with fabric.no_backward_sync(model):
        fabric.backward(model(x).square().sum())
    output = model(x)
    with pytest.raises(ValueError, match="on purpose"):
        fabric.backward(_Raises.apply(output).square().sum())
    optimizer.zero_grad()
    fabric.backward(model(x).square().sum())
    first = model.first.weight.grad
    optimizer.zero_grad()
    fabric.backward(model(x).square().sum())
    assert first is not None and model.first.weight.grad is not None
    assert torch.equal(first, model.first.weight.grad)
    fabric.teardown()
    return first


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ValueError("on purpose")


@needs_torch
def test_what_a_broken_backward_leaves_is_not_added_to_the_next() -> None:
    first, second = run_in_ranks(2, after_an_error)
    assert torch.equal(first, second) and first.dtype is torch.float32


def after_freezing() -> tuple[list[torch.dtype], bool]:
    """A layer is frozen and trained again: DDP's engine is made anew."""
    fabric = Fabric("cpu", devices=2, strategy=DDPStrategy(), precision=MASTER)
    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    fabric.setup(model, optimizer)
    dtypes = []
    for freeze in (False, True, False):
        model.side.requires_grad_(not freeze)
        optimizer.zero_grad()
        for _ in range(2):
            fabric.backward(model(torch.ones(2, SIZES[0])).square().sum())
        dtypes += [param.grad.dtype for param in model.parameters() if param.grad is not None]
        optimizer.step()
    twin = copy.deepcopy(model)
    plain = twin.first.weight.grad_dtype is torch.bfloat16 and torch.equal(twin.first.weight, model.first.weight)
    fabric.teardown()
    restored = model.first.weight.grad_dtype is torch.bfloat16
    model(torch.ones(2, SIZES[0], dtype=torch.bfloat16)).sum().backward()  # nobody reduces, nobody widens
    return dtypes, plain and restored and model.first.weight.grad is not None


@needs_torch
def test_an_engine_that_is_made_anew_keeps_them_wide() -> None:
    for dtypes, is_plain in run_in_ranks(2, after_freezing):
        assert dtypes == [torch.float32] * (5 + 4 + 5) and is_plain


@needs_torch
def test_views_of_buckets_are_refused_with_the_reason() -> None:
    strategy = DDPStrategy(gradient_as_bucket_view=True)
    assert "keeps gradients in DDP's buckets, which are bfloat16" in str(strategy.refuses(HalfPrecision(MASTER)))
    assert strategy.refuses(HalfPrecision("bf16-master")) is None


def kept() -> list[Tensor | None]:
    """Returns the side layer's gradient: of a step that used it, and after one that did not, on any rank."""
    strategy = DDPStrategy(find_unused_parameters=True)
    fabric = Fabric("cpu", devices=2, strategy=strategy, precision=MASTER)
    model = Net()
    fabric.setup(model, optim.SGD(model.parameters(), lr=1.0))
    found = []
    for side in (True, False):
        fabric.backward(model(torch.ones(2, SIZES[0]) + fabric.global_rank, side).square().sum())
        found.append(None if model.side.weight.grad is None else model.side.weight.grad.clone())
    fabric.teardown()
    return found


@needs_torch
def test_what_no_rank_uses_keeps_its_gradient() -> None:
    for used, unused in run_in_ranks(2, kept):
        assert used is not None and unused is not None and used.any() and torch.equal(used, unused)


class Twice(nn.Linear):
    """One layer in two checkpointed calls, each of which adds to its gradient in one backward."""

    def forward(self, x: Tensor) -> Tensor:
        layer = super().forward
        first: Tensor = checkpoint(layer, x * 256, use_reentrant=True)
        return first + checkpoint(layer, x, use_reentrant=True)


def used_twice(precision: str) -> list[Tensor]:
    fabric = Fabric("cpu", devices=2, strategy=DDPStrategy(static_graph=True), precision=precision)
    model = Twice(SIZES[0], 2, bias=False)
    fabric.setup(model, optim.SGD(model.parameters(), lr=1.0))
    found = []
    for _ in range(3):
        model.zero_grad()
        fabric.backward(model(torch.ones(1, SIZES[0], requires_grad=True) * (1 + 4 * fabric.global_rank)).sum())
        assert model.weight.grad is not None
        found.append(model.weight.grad)
    fabric.teardown()
    return found


@needs_torch
@pytest.mark.parametrize("precision", [MASTER, "bf16-master"])
def test_a_parameter_that_is_used_twice_in_one_backward(precision: str) -> None:
    for gradients in run_in_ranks(2, used_twice, precision):
        assert all(gradient.eq(3 * 257 if precision == MASTER else 772).all() for gradient in gradients)


def with_sparse_gradients(precision: str) -> str:
    """Returns what setup of an embedding with sparse gradients says, and else trains it."""
    fabric = Fabric("cpu", devices=2, strategy=DDPStrategy(), precision=precision)
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 2))
    try:
        fabric.setup(model, optim.SGD(model.parameters(), lr=1.0))
    except ValueError as error:
        return str(error)
    fabric.backward(model(torch.tensor([1, 3])).sum())
    fabric.teardown()
    return str(model[0].weight.grad.dtype)  # type: ignore[union-attr]


@needs_torch
def test_sparse_gradients_are_refused_with_the_way_out() -> None:
    for message in run_in_ranks(2, with_sparse_gradients, MASTER):
        assert message.startswith("grads=float32 under DDP is for dense gradients, and 0 of this Sequential makes")
        assert message.endswith('or name the layer in the policy ("; 0: 32-true")')
    assert run_in_ranks(2, with_sparse_gradients, f"{MASTER}; 0: 32-true") == ["torch.float32"] * 2


def compiled() -> Tensor | None:
    fabric = Fabric("cpu", devices=2, strategy=DDPStrategy(), precision=MASTER)
    model = nn.Linear(SIZES[0], 2, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    forward, _ = fabric.setup(torch.compile(model, backend="aot_eager", fullgraph=True), optimizer)
    for value in (256.0, 1.0):
        with fabric.no_backward_sync(forward, enabled=value == 256):
            fabric.backward(forward(torch.full((1, SIZES[0]), value * (1 + 4 * fabric.global_rank))).sum())
    return model.weight.grad


@needs_torch
@pytest.mark.full
@pytest.mark.usefixtures("true_modes_compile")
def test_a_compiled_model_has_them_too() -> None:
    for gradient in run_in_ranks(2, compiled):
        assert gradient is not None and gradient.dtype is torch.float32 and gradient.eq(3 * 257).all()
