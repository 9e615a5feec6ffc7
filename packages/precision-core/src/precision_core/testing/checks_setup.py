"""A set-up model, and one step: identity, flags, hooks, and the dtype after each stage.

Every check takes the contract (`kit`), which makes fabrics, models and optimizers.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from precision_core.testing.net import Net, loss_of, make_batch

if TYPE_CHECKING:
    from precision_core.testing.contract import Contract


def setup_returns_the_very_objects(kit: Contract) -> None:
    fabric, model = kit.make_fabric(), kit.make_model()
    optimizer = kit.make_optimizer(model)
    custom, keys = model.custom, list(model.state_dict())
    returned = fabric.setup(model, optimizer)
    assert returned[0] is model and returned[1] is optimizer
    assert isinstance(model, Net) and model.custom is custom
    assert list(model.state_dict()) == keys


def copies_of_a_model_are_complete(kit: Contract) -> None:
    fabric, model = kit.make_fabric(), kit.make_model()
    fabric.setup(model, kit.make_optimizer(model))
    batch, _ = make_batch(0, device=fabric.device)
    pickled = pickle.loads(pickle.dumps(model))  # a plain model: the file must load without a Fabric
    assert type(pickled) is type(model) and list(pickled.state_dict()) == list(model.state_dict())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(pickled.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(batch), model(batch))


def conversion_keeps_flags_ties_and_hooks(kit: Contract) -> None:
    fabric, model = kit.make_fabric(), kit.make_model()
    blocks: Any = model.blocks
    model.blocks[1].eval()
    blocks[0].norm.bias.requires_grad_(False)
    calls = []
    handle = blocks[0].up.register_forward_hook(lambda layer, args, output: calls.append(layer))
    fabric.setup(model, kit.make_optimizer(model))
    batch, _ = make_batch(0, device=fabric.device)
    model(batch)
    assert calls == [blocks[0].up]
    handle.remove()
    model(batch)
    assert len(calls) == 1
    assert model.training and model.blocks[0].training
    assert not any(module.training for module in model.blocks[1].modules())
    assert not blocks[0].norm.bias.requires_grad and not model.frozen.requires_grad
    assert blocks[0].norm.weight.requires_grad
    assert model.head.weight is model.embedding.weight


def an_optimizer_made_before_setup_trains_the_parameters_in_use(kit: Contract) -> None:
    fabric, model = kit.make_fabric(), kit.make_model()
    optimizer = kit.make_optimizer(model)
    fabric.setup(model, optimizer)
    ours = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert ours == {id(param) for param in model.parameters()}


def inputs_reach_forward_as_the_mode_says(kit: Contract) -> None:
    fabric, model = kit.make_fabric(), kit.make_model()
    fabric.setup(model, kit.make_optimizer(model))
    batch, _ = make_batch(0, device=fabric.device)
    model(batch)
    policy = fabric.precision_plugin.policy
    assert torch.equal(model.seen["ids"], batch["ids"]) and model.seen["ids"].dtype is torch.int64
    assert torch.equal(model.seen["keep"], batch["keep"]) and model.seen["keep"].dtype is torch.bool
    wanted = batch["shift"] if policy.mixed else batch["shift"].to(policy.compute)
    assert model.seen["shift"].dtype is wanted.dtype and torch.equal(model.seen["shift"], wanted)


def every_stage_has_its_dtype(kit: Contract) -> None:
    fabric, model = kit.make_fabric(), kit.make_model()
    optimizer = kit.make_optimizer(model)
    fabric.setup(model, optimizer)
    plugin = fabric.precision_plugin
    policy = plugin.policy
    seen: list[torch.dtype] = []
    blocks: Any = model.blocks
    for layer in (blocks[0].up, blocks[1].down, model.head):
        layer.register_forward_hook(lambda layer, args, output: seen.append(output.dtype))
    batch, target = make_batch(0, device=fabric.device)
    output = model(batch)
    assert output.dtype is policy.output
    assert set(seen) == {policy.compute}
    fabric.backward(loss_of(output, target))
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    optimizer.step()
    params = {param.dtype for param in model.parameters() if plugin.storage(param) is not None}
    assert params == {policy.params}
    assert {gradient.dtype for gradient in gradients} <= {policy.grads}
    assert model.decay.dtype is policy.buffers and model.offsets.dtype is torch.int64
    assert _state_dtypes(optimizer) <= {policy.state}


def evaluation_returns_the_output_dtype(kit: Contract) -> None:
    fabric, model = kit.make_fabric(), kit.make_model()
    fabric.setup(model, kit.make_optimizer(model))
    model.eval()
    batch, _ = make_batch(0, device=fabric.device)
    with torch.no_grad():
        output = model(batch)
        assert output.dtype is fabric.precision_plugin.policy.output and not output.requires_grad
        assert torch.equal(model(batch), output)


def nothing_leaks_out_of_forward(kit: Contract) -> None:
    fabric, model = kit.make_fabric(), kit.make_model()
    fabric.setup(model, kit.make_optimizer(model))
    batch, target = make_batch(0, device=fabric.device)
    fabric.backward(loss_of(model(batch), target))
    with contextlib.suppress(KeyError):
        model({"ids": batch["ids"]})  # fails in the middle of forward
    device_type = fabric.device.type
    assert torch.get_default_dtype() is torch.float32 and torch.zeros(1).dtype is torch.float32
    assert not torch.is_autocast_enabled(device_type) and torch.is_grad_enabled()


def _state_dtypes(optimizer: Any) -> set[torch.dtype]:
    values = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    return {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}
