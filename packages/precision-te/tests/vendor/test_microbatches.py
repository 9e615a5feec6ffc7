"""What is made of a weight between two steps is made once: padded copies, and FP8 in the vendor's first microbatch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from precision_core import Fabric
from precision_te.plugin import TransformerEnginePrecision
from precision_te.vendor.microbatches import Kept, accumulating

MORE = (0, 2, 0, 6)  # (10, 14) to (16, 16)


class Pads(TorchDispatchMode):
    """Counts the operators that pad; those of backward cut."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket is torch.ops.aten.constant_pad_nd and min(args[1]) >= 0
        return func(*args, **(kwargs or {}))


def made() -> tuple[nn.Parameter, nn.Parameter, Kept]:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(10, 14)), nn.Parameter(torch.randn(10)), Kept()


def forward(
    weight: Tensor, bias: Tensor, x: Tensor, padded: Callable[[str, Tensor, tuple[int, ...]], Tensor]
) -> Tensor:
    return linear(pad(x, (0, 2)), padded("weight", weight, MORE), padded("bias", bias, (0, 6)))[:, :10]


def plain(name: str, tensor: Tensor, more: tuple[int, ...]) -> Tensor:
    return pad(tensor, more)


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("fused", [False, True])
def test_weights_are_padded_once_a_step_and_train_as_if_padded_in_each_forward(fused: bool) -> None:
    results = []
    for again in (True, False):
        weight, bias, kept = made()
        optimizer = AdamW([weight, bias], lr=0.1, fused=fused)
        with Pads() as pads:
            for _ in range(3):
                optimizer.zero_grad()
                for row in range(4):
                    x = torch.full((2, 14), row - 1.0)
                    forward(weight, bias, x, plain if again else kept.padded).square().sum().backward()
                optimizer.step()
        results.append((weight, bias, weight.grad, bias.grad))
        inputs = 3 * 4
        assert pads.count == inputs + (2 * inputs if again else 2 * 3)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.add_(1.0)


def other_memory(weight: nn.Parameter) -> None:
    weight.data = weight.data + 1.0


def by_an_optimizer(weight: nn.Parameter) -> None:
    class Data(Optimizer):
        def step(self, closure: Any = None) -> None:
            weight.data.add_(1.0)  # of which torch counts no version

    Data([weight], {}).step()


def loaded(weight: nn.Parameter) -> None:
    layer = nn.Module()
    layer.weight = weight
    layer.load_state_dict({"weight": weight.detach() + 1.0})


@pytest.mark.parametrize("change", [in_place, other_memory, by_an_optimizer, loaded])
def test_a_changed_weight_is_padded_and_quantised_anew(change: Callable[[nn.Parameter], None]) -> None:
    weight, _, kept = made()
    with accumulating():
        kept.padded("weight", weight, MORE)
        assert kept.is_first_microbatch(weight) and kept.is_first_microbatch(weight) is False
        change(weight)
        assert torch.equal(kept.padded("weight", weight, MORE), pad(weight, MORE))
        assert kept.is_first_microbatch(weight)


def test_without_gradients_nothing_is_kept_since_people_evaluate_with_other_weights() -> None:
    weight, _, kept = made()
    with accumulating():
        kept.padded("weight", weight, MORE)
        kept.is_first_microbatch(weight)
        weight.data.mul_(2.0)
        with torch.no_grad():
            assert torch.equal(kept.padded("weight", weight, MORE), pad(weight, MORE))
            assert kept.is_first_microbatch(weight) is None


def test_what_needs_no_padding_is_the_weight_itself() -> None:
    weight, _, kept = made()
    assert kept.padded("weight", weight, (0, 0, 0, 0)) is weight


def test_copies_and_pickles_keep_nothing() -> None:
    weight, _, kept = made()
    kept.padded("weight", weight, MORE)
    for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert not twin._padded and kept._padded


# ---------------------------------------------------------------- is_first_microbatch


class Layer(nn.Linear):
    """Notes what the vendor's layer would be told."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.kept = Kept()
        self.told: list[bool | None] = []

    def forward(self, x: Tensor) -> Tensor:
        self.told.append(self.kept.is_first_microbatch(self.weight))
        return super().forward(x)


@pytest.mark.parametrize("fused", [False, True])
def test_the_vendor_is_told_which_microbatch_is_the_first(fused: bool) -> None:
    plugin = TransformerEnginePrecision("bf16-mixed")
    layer = Layer()
    optimizer = AdamW(layer.parameters(), fused=fused)
    for _ in range(2):
        for number in range(3):
            with plugin.accumulation_context(number < 2):
                layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    layer(torch.ones(1, 4)).sum().backward()  # a loop that does not accumulate
    with torch.no_grad():
        layer(torch.ones(1, 4))
    assert layer.told == [True, False, False, True, False, False, None, None]
    with plugin.accumulation_context(True):
        layer(torch.ones(1, 4))
        layer.kept.forget_quantized()  # as where FP8 was off
        layer(torch.ones(1, 4))
    assert layer.told[-2:] == [True, True]


def test_fabric_tells_the_precision() -> None:
    seen: list[bool] = []

    class Noting(TransformerEnginePrecision):
        def accumulation_context(self, enabled: bool) -> Any:
            seen.append(enabled)
            return super().accumulation_context(enabled)

    model = nn.Linear(32, 32)
    fabric = Fabric("cpu", precision=Noting("bf16-mixed", engine="reference"))
    model, optimizer = fabric.setup(model, SGD(model.parameters(), lr=0.1))
    for last in (False, True):
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(model(torch.ones(16, 32)).sum())
    optimizer.step()
    assert seen == [True, False]
