import copy

import pytest
import torch
from torch import nn

from precision_lab import Task
from precision_lab.lora import RANK, LoRA, add_adapters


def make(model=None, groups=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 3))
    optimizer = torch.optim.AdamW(model.parameters() if groups is None else groups(model), lr=1e-2)
    return Task(model, optimizer, lambda seed: [torch.ones(4, 6)], lambda model, batch: model(batch).square().mean())


def test_at_the_start_nothing_has_changed_and_then_only_adapters_move():
    plain, task = make(), make()
    add_adapters(task)
    model, batch = task.model, torch.randn(4, 6)
    assert torch.equal(model(batch), plain.model(batch))
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained == {f"{index}.lora_{part}.weight" for index in (0, 2) for part in "AB"}
    before = copy.deepcopy(dict(model.named_parameters()))
    for _ in range(3):
        task.optimizer.zero_grad()
        task.compute_loss(model, batch).backward()
        task.optimizer.step()
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert moved == trained
    layer, x = model[0], torch.randn(2, 6)
    weight = layer.base_layer.weight + 2 * layer.lora_B.weight @ layer.lora_A.weight  # alpha 16, rank 8
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.base_layer.bias))
    assert layer.lora_A.weight.shape == (RANK, 6)


def test_adapters_have_the_rate_of_the_group_that_their_layer_was_in_and_frozen_layers_get_none():
    task = make(groups=lambda model: [{"params": model[1].parameters()}, {"params": model[2].parameters(), "lr": 5e-4}])
    add_adapters(task)
    (group,) = task.optimizer.param_groups
    assert group["lr"] == 5e-4 and group["params"] == [task.model[2].lora_A.weight, task.model[2].lora_B.weight]
    assert isinstance(task.model[0], nn.Linear) and isinstance(task.model[2], LoRA)


def test_a_transformer_is_evaluated_with_its_adapters():
    """Its fused kernel would read the weights past them."""
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        task = make(nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True))
        model, batch = task.model.eval(), torch.randn(2, 3, 6)
        with torch.no_grad():
            before = model(batch)
            add_adapters(task)
            torch.testing.assert_close(model(batch), before)
            nn.init.ones_(model.linear1.lora_B.weight)
            assert (model(batch) - before).abs().max() > 0.01
        assert type(model.self_attn.out_proj) is not LoRA  # whose forward nobody calls
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def with_adapters():
    task = make()
    add_adapters(task)
    return task


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: make(nn.Conv1d(1, 2, 3)), "this task trains none"),
        (lambda: make(groups=lambda model: model[1].parameters()), "this task trains none"),
        (with_adapters, "adapters of its own"),
    ],
)
def test_where_there_is_nothing_to_put_them_on(made, said):
    with pytest.raises(ValueError, match=said):
        add_adapters(made())
