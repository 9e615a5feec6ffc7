"""Unsynced gradients: another scale, zero_grad, a step that would ignore them, and torch's private names."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import SGD

from precision_core import Fabric, MixedPrecision
from precision_core.testing import run_in_ranks
from precision_fsdp import FSDPPrecision, FSDPStrategy
from precision_fsdp.unsynced import Unsynced

MESSAGE = (
    "SGD.step() would ignore unsynced gradients, accumulated in fabric.no_backward_sync: first.weight, first.bias, "
    "blocks.0.weight, blocks.0.bias, blocks.1.weight and 3 more. Run the last backward of an accumulation outside of "
    "it, or drop them with zero_grad() [unsynced-gradients]"
)


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def loss(model: nn.Module, step: int, rank: int, dtype: torch.dtype | None = None) -> Tensor:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(10 * step + rank))
    return model(x.to(dtype)).pow(2).mean()  # type: ignore[no-any-return]


def reference(seed: int, *steps: int) -> dict[str, Tensor]:
    """Returns the gradients of both ranks' batches of `steps`, in float64."""
    model = Net(seed).double()
    sum(loss(model, step, rank, torch.float64) / 2 for step in steps for rank in range(2)).backward()  # type: ignore[union-attr]
    return {name: param.grad for name, param in model.named_parameters()}  # type: ignore[misc]


def gradients(model: nn.Module) -> dict[str, Any]:
    return {name: param.grad.full_tensor().double() for name, param in model.named_parameters()}  # type: ignore[union-attr]


PRECISIONS = {
    "FSDPPrecision": lambda options: FSDPPrecision("16-mixed", options),
    "MixedPrecision": lambda options: MixedPrecision("16-mixed", "cpu", options),
    "exceptions": lambda options: FSDPPrecision("16-mixed; blocks.0: 32-true", options),
}


def while_another_steps(precision: str) -> tuple[list[float], dict[str, Any]]:
    """Two models: one accumulates, the other one steps meanwhile, and with each step the loss scale doubles."""
    plugin = PRECISIONS[precision]({"init_scale": 64.0, "growth_interval": 1})
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(), precision=plugin)
    one, other = Net(0), Net(1)
    stepped, kept = SGD(one.parameters(), lr=0.01), SGD(other.parameters(), lr=0.01)
    fabric.setup(one, stepped)
    fabric.setup(other, kept)
    rank, scales = fabric.global_rank, [plugin.scale]
    for step in range(3):
        with fabric.no_backward_sync(other, enabled=step < 2):
            fabric.backward(loss(other, step, rank))
        if step < 2:
            stepped.zero_grad()
            fabric.backward(loss(one, step, rank))
            stepped.step()
        scales.append(plugin.scale)
    plugin.unscale_gradients(kept)
    return scales, gradients(other)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_they_follow_the_loss_scale(precision: str) -> None:
    expected = reference(1, 0, 1, 2)
    for scales, found in run_in_ranks(2, while_another_steps, precision):
        assert scales == [64.0, 128.0, 256.0, 256.0]
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 0.005 * gradient.norm(), name


def dropped(owner: str) -> dict[str, Any]:
    """An accumulation is given up before its last backward, and another begins."""
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(), precision="64-true")
    model, beside = Net(1), Net(2)
    optimizer, others = SGD(model.parameters(), lr=0.1), SGD(beside.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    fabric.setup(beside, others)
    for each in (model, beside):
        with fabric.no_backward_sync(each):
            fabric.backward(loss(each, 0, fabric.global_rank))
    (optimizer if owner == "optimizer" else model).zero_grad()
    fabric.backward(loss(model, 1, fabric.global_rank))
    fabric.backward(loss(beside, 1, fabric.global_rank))
    return {"dropped": gradients(model), "kept": gradients(beside)}


@pytest.mark.parametrize("owner", ["optimizer", "model"])
def test_zero_grad_drops_its_own(owner: str) -> None:
    expected = {"dropped": reference(1, 1), "kept": reference(2, 0, 1)}
    for found in run_in_ranks(2, dropped, owner):
        for which, reference_gradients in expected.items():
            for name, gradient in reference_gradients.items():
                torch.testing.assert_close(found[which][name], gradient, rtol=1e-12, atol=1e-15)


def step_too_early(mode: str, with_closure: bool) -> tuple[str, int, bool]:
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(), precision=mode)
    model = Net(1)
    optimizer = SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)

    def closure() -> Tensor:
        with fabric.no_backward_sync(model):
            value = loss(model, 0, fabric.global_rank) * 0.01
            fabric.backward(value)
        return value

    if not with_closure:
        closure()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step(closure if with_closure else None)
    fabric.backward(loss(model, 1, fabric.global_rank) * 0.01)  # the accumulation goes on
    before = model.head.bias.full_tensor().clone()  # type: ignore[operator]
    optimizer.step()
    is_other = not torch.equal(before, model.head.bias.full_tensor())  # type: ignore[operator]
    return str(caught.value), fabric.precision_plugin.steps, is_other or fabric.last_step_skipped


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("mode", ["32-true", "16-mixed"])
def test_a_step_that_would_leave_them_out_is_an_error(mode: str, with_closure: bool) -> None:
    for message, steps, moved in run_in_ranks(2, step_too_early, mode, with_closure):
        assert message == MESSAGE and steps == 1 and moved


def test_a_strategy_goes_to_processes_that_are_started_with_it() -> None:
    strategy = FSDPStrategy(wrap="Block", mesh=(1, 2), reshard_after_forward=False, state_dict_type="full")
    copy = pickle.loads(pickle.dumps(strategy))
    assert {name: vars(copy)[name] for name in ("_wrap", "_mesh", "_reshard_after_forward", "sharded")} == {
        name: vars(strategy)[name] for name in ("_wrap", "_mesh", "_reshard_after_forward", "sharded")
    }
    assert list(copy._unsynced.roots) == []


# ---------------------------------------------------------------- torch's private names

PRIVATE = [
    "FSDPModule._get_fsdp_state",
    "FSDPState._fsdp_param_groups",  # torch 2.9: _fsdp_param_group, which newer ones have beside it
    "FSDPParamGroup.fsdp_params",
    "FSDPParam.sharded_param",
    "FSDPParam.unsharded_accumulated_grad",
    "FSDPParam._unsharded_param",
]
"""All that precision_fsdp reads of FSDP2 that is not public."""


def sharded() -> Any:
    """Returns a model that `fully_shard` has sharded over one rank, after a backward that reduced nothing."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model: Any = fully_shard(nn.Linear(4, 4))
    model.set_requires_gradient_sync(False)
    model(torch.ones(1, 4)).sum().backward()
    return model


def owners(model: Any) -> dict[str, Any]:
    """Returns the objects that hold what is private, by the names of their classes."""
    state = model._get_fsdp_state()
    group = state._fsdp_param_group
    return {"FSDPState": state, "FSDPParamGroup": group, "FSDPParam": group.fsdp_params[0]}


def read() -> dict[str, Any]:
    held, model = Unsynced(), sharded()
    held.add(model)
    found = owners(model)
    handle = found["FSDPParam"]
    return {
        "names": [f"{kind}.{name}" for kind, each in found.items() for name in dir(each)],
        "classes": [type(each).__name__ for each in found.values()],
        "is the parameter": handle.sharded_param is model.weight and model.weight.grad is None,
        "gathered": handle._unsharded_param.grad,
        "gradients": held._gradients(),
    }


def test_what_is_read_is_there_and_holds_the_unsynced_gradient() -> None:
    (found,) = run_in_ranks(1, read)
    assert found["classes"] == ["FSDPState", "FSDPParamGroup", "FSDPParam"] and found["is the parameter"]
    singular = {
        "FSDPState._fsdp_param_groups" if name == "FSDPState._fsdp_param_group" else name for name in found["names"]
    }
    assert {*PRIVATE[1:]} <= {*found["names"], *singular}
    assert torch.equal(found["gathered"], torch.ones(4, 4))
    assert [gradient.shape for gradient in found["gradients"]] == [(4, 4), (4,)]


def renamed(name: str) -> str:
    """Returns the error of a model that is set up where torch has given `name` another name."""
    model = sharded()
    kind, _, attribute = name.partition(".")
    owner = FSDPModule if kind == "FSDPModule" else type(owners(model)[kind])
    hidden = {attribute, attribute.removesuffix("s")} if "groups" in attribute else {attribute}

    def read(self: Any, asked: str) -> Any:
        if asked in hidden:
            raise AttributeError(asked)
        return object.__getattribute__(self, asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "__getattribute__", read, raising=False)
        if attribute == "_unsharded_param":
            patch.delitem(owner.__annotations__, attribute)
        with pytest.raises(RuntimeError) as caught:
            Unsynced().add(model)
    return str(caught.value)


@pytest.mark.parametrize("name", PRIVATE)
def test_a_name_that_torch_no_longer_has_is_an_error_at_setup(name: str) -> None:
    (message,) = run_in_ranks(1, renamed, name)
    name = name.replace("FSDPModule", "FSDPLinear")
    assert message.startswith(f"torch {torch.__version__} has no {name}") and "private name" in message
