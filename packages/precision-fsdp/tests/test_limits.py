"""What cannot be sharded, or stepped, is refused before anything is changed, and the next setup is right."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import SGD, Adagrad, Rprop, SparseAdam

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_fsdp import FSDPStrategy


class Net(nn.Module):
    """Two blocks, and a parameter of its own."""

    def __init__(self, own: torch.Tensor | None = None, in_block: torch.Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2))
        self.head = nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.ones(4))
        self.own = None if own is None else nn.Parameter(own, requires_grad=own.is_floating_point())
        if in_block is not None:
            self.blocks[1].own = nn.Parameter(in_block, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.shift


def setup(model: nn.Module, mode: str = "bf16-mixed", optimizer: object = None, **options: object) -> nn.Module:
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(**options), precision=mode)  # type: ignore[arg-type]
    return fabric.setup(model) if optimizer is None else fabric.setup(model, optimizer)[0]  # type: ignore[no-any-return]


def sgd_beside(model: nn.Module) -> SGD:
    return SGD([*model.parameters(), nn.Parameter(torch.ones(3))], lr=0.1)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object], str]] = {
    "scalar": (lambda: Net(torch.tensor(1.0)), setup, r"0-dimensional .*: own\. Give them a dimension: nn\.Param"),
    "complex": (lambda: Net(torch.ones(4, dtype=torch.complex64)), setup, r"complex parameters: own\. .*view_as_real"),
    "root's integers": (lambda: Net(torch.arange(4)), setup, r"^shift, own: FSDP gathers what the model holds itself"),
    "block's integers": (lambda: Net(None, torch.arange(4)), setup, r"^blocks\.1\.own: .* what blocks\.1 holds itself"),
    "sparse": (lambda: nn.Embedding(4, 4, sparse=True), setup, "cannot reduce sparse gradients"),
    "beside": (Net, lambda model: setup(model, optimizer=sgd_beside(model)), r"others beside them.*shape \(3,\)"),
    "rprop": (Net, lambda model: setup(model, optimizer=Rprop(model.parameters())), "Rprop cannot run under"),
    "sparse adam": (Net, lambda model: setup(model, optimizer=SparseAdam(model.parameters())), "SparseAdam cannot run"),
    "fresh adagrad": (
        Net,
        lambda model: setup(model, optimizer=Adagrad(model.parameters())),
        r"makes its state in its constructor.*after fabric\.setup\(model\) and give it to fabric\.setup_optimizers",
    ),
    "wrap": (Net, lambda model: setup(model, wrap="Blok"), "matches no module"),
    "part of the processes": (
        Net,
        lambda model: setup(model, mesh=DeviceMesh("cpu", [torch.distributed.get_rank()])),
        r"is of the processes \[\d\], the run has 2",
    ),
    "no divisor": (Net, lambda model: setup(model, reshard_after_forward=3), "2 shards do not divide into 3"),
}


def refusals() -> dict[str, str]:
    torch.distributed.init_process_group("gloo")
    messages = {}
    for name, (make, refused, _) in REFUSED.items():
        model = make()
        kind = type(model)
        for _ in range(2):  # the second one finds the same problem, not a model that is half set up
            with pytest.raises(ValueError) as caught:
                refused(model)
            assert messages.setdefault(name, str(caught.value)) == str(caught.value), name
        assert type(model) is kind and not any("forward" in vars(module) for module in model.modules()), name
    return messages


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_a_refused_setup_leaves_the_model_as_it_was() -> None:
    for messages in run_in_ranks(2, refusals):
        for name, (_, _, reason) in REFUSED.items():
            assert re.search(reason, messages[name], re.DOTALL), (name, messages[name])


def trained_after_a_refusal() -> list[float]:
    model = Net()
    with pytest.raises(ValueError, match="others beside them"):
        setup(model, optimizer=sgd_beside(model))
    fabric = Fabric(accelerator="cpu", strategy="fsdp", precision="bf16-mixed")
    optimizer = SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    fabric.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    return model.shift.full_tensor().tolist()  # type: ignore[attr-defined, no-any-return]


def test_after_a_refused_setup_a_right_one_trains() -> None:
    for shift in run_in_ranks(2, trained_after_a_refusal):
        assert shift == pytest.approx([0.8] * 4)  # ones less 0.1 times a gradient of two


class Index(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.index = nn.Parameter(torch.arange(3, -1, -1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., self.index]


def indexed() -> list[float]:
    model = setup(nn.Sequential(Index(), nn.Identity()), wrap=Index)
    alone = setup(Index())
    return [*model(torch.arange(4.0)).tolist(), *alone(torch.arange(4.0)).tolist()]


def test_a_block_that_holds_nothing_else_may_hold_integers() -> None:
    assert run_in_ranks(2, indexed) == [[3.0, 2.0, 1.0, 0.0] * 2] * 2


def expanded() -> list[list[float]]:
    fabric, model = Fabric(accelerator="cpu", strategy="fsdp"), nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((1, 2), 1.0 + fabric.global_rank).expand(3, 2))
    fabric.setup(model)
    assert model.mask.stride() == (0, 1)  # type: ignore[union-attr, operator]
    return model.mask.tolist()  # type: ignore[union-attr, operator, no-any-return]


def test_expanded_buffers_get_rank_zeros_values() -> None:
    assert run_in_ranks(2, expanded) == [[[1.0, 1.0]] * 3] * 2


def added(how: str) -> list[list[float]]:
    model = Net()
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(), precision="32-true")
    optimizer = SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    torch.manual_seed(fabric.global_rank)
    model.head = nn.Sequential(model.head, nn.Linear(4, 4))
    if how == "a group":
        optimizer.add_param_group({"params": list(model.head[1].parameters())})
    before = [param.detach().clone() for param in optimizer.param_groups[0]["params"]]
    fabric.backward(model(torch.ones(2, 4)).sum())
    with pytest.raises(ValueError, match=r"added to a model after fabric\.setup: head\.1\.weight, head\.1\.bias\."):
        if how == "a group":
            optimizer.step()
        else:
            fabric.setup_optimizers(SGD(model.head[1].parameters(), lr=0.1))
    now = optimizer.param_groups[0]["params"]
    pairs = zip(before, now, strict=True)
    return [[float((old - new.detach()).full_tensor().abs().max()) for old, new in pairs]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["a group", "an optimizer"])
def test_layers_that_were_added_after_setup_are_not_stepped(how: str) -> None:
    for (moved,) in run_in_ranks(2, added, how):
        assert moved == [0.0] * len(moved)


def unfrozen() -> list[float]:
    model = Net()
    model.head.requires_grad_(False)
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(), precision="64-true")
    optimizer = SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    for step in range(2):
        model.head.requires_grad_(step == 1)
        optimizer.zero_grad()
        fabric.backward(model(BATCHES[step].chunk(2)[fabric.global_rank]).pow(2).mean())
        optimizer.step()
    return model.head.weight.full_tensor().flatten().tolist()  # type: ignore[operator, no-any-return]


BATCHES = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_what_is_unfrozen_after_setup_is_averaged() -> None:
    model = Net().double()
    model.head.requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.1)
    for step in range(2):
        model.head.requires_grad_(step == 1)
        optimizer.zero_grad()
        model(BATCHES[step]).pow(2).mean().backward()
        optimizer.step()
    for weight in run_in_ranks(2, unfrozen):
        torch.testing.assert_close(torch.tensor(weight), model.head.weight.flatten().float(), rtol=1e-6, atol=0)
