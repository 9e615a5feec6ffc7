"""LoRA in a few lines: a task whose linear layers get adapters, which train in place of everything else.

The adapter of a layer with the weight W is B A, of a small rank, and adds `scale * B A x` to the layer's W x (Hu et al.
2021). B is zero at the start, so that nothing has changed. Names are peft's: plugins that quantise the layers leave
`lora_A` and `lora_B` alone. What trains takes the place of the layer's weight in the optimizer's groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from precision_lab.task import Task

RANK, ALPHA = 8, 16


class LoRA(nn.Module):
    """A linear layer and its adapter."""

    def __init__(self, layer: nn.Module, inputs: int, outputs: int, device: torch.device) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.Linear(inputs, RANK, bias=False, device=device)
        self.lora_B = nn.Linear(RANK, outputs, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x)) * (ALPHA / RANK)
        return added


def add_adapters(task: Task) -> None:
    """Puts adapters on the linear layers that the task trains, freezes the rest, and changes the optimizer's groups.

    Raises:
        ValueError: no linear layer trains; there are adapters already; or the optimizer has stepped already.
    """
    model, optimizer = task.model, task.optimizer
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("+lora: the task has adapters of its own; compare the mode without +lora")
    if optimizer.state:
        raise ValueError("+lora: make() returned an optimizer that has stepped already")
    layers = {name: layer for name, layer in model.named_modules() if name and _sizes(layer) is not None}
    groups = {id(param): index for index, group in enumerate(optimizer.param_groups) for param in group["params"]}
    taken = {name: layer for name, layer in layers.items() if id(layer.weight) in groups}
    if not taken:
        raise ValueError("+lora: adapters go on linear layers, and this task trains none")
    # The fused kernel of nn.TransformerEncoderLayer reads its layers' weights, past their adapters.
    torch.backends.mha.set_fastpath_enabled(False)
    model.requires_grad_(False)
    params: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
    for name, layer in taken.items():
        sizes = _sizes(layer)
        assert sizes is not None
        adapted = LoRA(layer, *sizes, layer.weight.device)
        adapted.train(layer.training)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, adapted)
        params[groups[id(layer.weight)]] += [adapted.lora_A.weight, adapted.lora_B.weight]
    for group, new in zip(optimizer.param_groups, params, strict=True):
        group["params"] = new
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Returns inputs and outputs of a linear layer, None for anything else; a subclass may not call its own forward."""
    if type(layer) is nn.Linear:
        return layer.in_features, layer.out_features
    weight = getattr(layer, "weight", None)
    if type(layer).__name__ == "Conv1D" and isinstance(weight, nn.Parameter):  # GPT-2's
        inputs, outputs = weight.shape
        return inputs, outputs
    return None
