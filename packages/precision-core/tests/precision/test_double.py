"""Double precision in a hand-written loop, against the same loop under torch's float64 default dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from precision_core import DoublePrecision

F64, F32, C64, C128 = torch.float64, torch.float32, torch.complex64, torch.complex128


class Model(nn.Module):
    """Makes tensors in its forward, takes nested inputs and keyword arguments, and has complex parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 3)
        self.wave = nn.Parameter(torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("phase", torch.polar(torch.ones(4), torch.arange(4.0) / 3))
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, ids: Tensor, extra: dict[str, Any], *, mask: Tensor) -> dict[str, Any]:
        position = torch.arange(ids.shape[0]) / 7
        x = self.embedding(ids) + position[:, None] + extra["x"][0] * torch.tensor(0.1) * mask
        x = x + torch.fft.ifft(torch.fft.fft(x) * self.wave * self.phase * extra["phase"]).real
        self.seen = {"position": position.dtype, "x": extra["x"][0].dtype, "phase": extra["phase"].dtype}
        return {"logits": self.linear(self.norm(x)), "ids": ids, "wave": (self.wave * 2,)}


def batch() -> tuple[Any, Any]:
    ids = torch.arange(6) % 11
    return (ids, {"x": [torch.linspace(0, 1, 4)], "phase": torch.tensor(1j)}), {"mask": torch.tensor([True, False] * 2)}


def make() -> Model:
    torch.manual_seed(0)
    return Model()


def train(model: Model, forward: Callable[..., Any], backward: Callable[[Tensor], Any]) -> tuple[list[float], Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        args, kwargs = batch()
        output = forward(*args, **kwargs)
        loss = output["logits"].square().mean()
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, output


def test_training_is_torchs_own_float64_training_bit_for_bit() -> None:
    model = make()
    reference: Any = copy.deepcopy(model).double()
    reference.wave.data = reference.wave.data.to(C128)
    reference.phase = reference.phase.to(C128)

    def plain(ids: Tensor, extra: dict[str, Any], *, mask: Tensor) -> Any:
        extra = {"x": [extra["x"][0].double()], "phase": extra["phase"].to(C128)}
        torch.set_default_dtype(F64)
        try:
            return reference(ids, extra, mask=mask)
        finally:
            torch.set_default_dtype(F32)

    precision = DoublePrecision()
    assert precision.convert_module(model) is model

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = precision.convert_input((args, kwargs))
        with precision.forward_context():
            output = model(*args, **kwargs)
        assert torch.get_default_dtype() is F32 and torch.zeros(1).dtype is F32
        return precision.convert_output(output)

    losses, output = train(model, forward, lambda loss: precision.backward(loss, model))
    expected, _ = train(reference, plain, lambda loss: loss.backward())
    assert losses == expected and losses[-1] < losses[0]
    assert model.seen == {"position": F64, "x": F64, "phase": C128}
    assert (output["logits"].dtype, output["ids"].dtype, output["wave"][0].dtype) == (F64, torch.int64, C128)
    tensors = model.state_dict()
    assert {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype is not F64} == {
        **dict.fromkeys(("wave", "phase"), C128),
        "norm.num_batches_tracked": torch.int64,
    }
    assert all(torch.equal(tensor, reference.state_dict()[name]) for name, tensor in tensors.items())


def test_conversion_keeps_the_float32_values() -> None:
    model, plain = make(), make()
    DoublePrecision().convert_module(model)
    for mine, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine.to(theirs.dtype), theirs)


def test_outputs_come_as_they_come() -> None:
    precision = DoublePrecision()
    for dtype in (F64, F32, torch.bfloat16, C64, torch.int32):
        x = torch.ones(1).to(dtype)
        assert precision.convert_output({"x": x})["x"] is x


def test_activation_checkpoints_take_the_context() -> None:
    precision = DoublePrecision()
    layer = precision.convert_module(nn.Linear(4, 4))
    x = torch.ones(2, 4, dtype=F64)

    def block(x: Tensor) -> Tensor:
        return layer(x * torch.ones(4)).tanh() * (torch.arange(4) / 3)

    with precision.forward_context():
        expected = torch.autograd.grad(block(x).sum(), layer.weight)[0]
        y = checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), precision.forward_context()))
    precision.backward(y.sum(), layer)
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("argument", ["64-true", 64, "64", "params=float64"])
def test_the_policy_argument(argument: Any) -> None:
    assert DoublePrecision(policy=argument).policy == DoublePrecision().policy
