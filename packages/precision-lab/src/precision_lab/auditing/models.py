"""What a model says of itself when it is first called: who made it half by name, and which weights should be one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from precision_core.override import is_overridden
from precision_lab.auditing.holds import HALVES
from precision_lab.auditing.names import Names
from precision_lab.auditing.record import Record


def read_model(record: Record, names: Names, root: nn.Module) -> None:
    """Notes engines whose named mode decides the parameters' dtype, and weights that are two and should be one."""
    asked = _asked(root)
    if asked and asked not in record.engines:
        record.engines.append(asked)
    if record.steps == 0 and not record.of("step"):
        for found in (*_untied_by_config(names, root), *_untied_by_value(names, root)):
            if all(found[:2] != each[:2] for each in record.untied):
                record.untied.append(found)


def _asked(root: nn.Module) -> str:
    inner: Any = root
    while True:
        if isinstance(inner, nn.Module) and is_overridden(inner, "forward"):
            return "precision"
        plugin = getattr(inner.__dict__.get("_strategy"), "precision", None)  # of Lightning's Fabric
        plugin = plugin or getattr(inner.__dict__.get("_trainer"), "precision_plugin", None)
        if plugin is not None:
            mode = str(getattr(plugin, "precision", ""))
            return f"Lightning {mode}" if mode.endswith("-true") and mode.startswith(("bf16", "16")) else ""
        if type(inner).__name__ == "DeepSpeedEngine":
            return "DeepSpeed"
        wrapped = next((inner._modules[name] for name in ("module", "_forward_module") if name in inner._modules), None)
        if wrapped is None:
            return ""
        inner = wrapped


def _untied_by_config(names: Names, root: nn.Module) -> list[tuple[str, str, str]]:
    found = []
    module: Any
    for module in root.modules():
        if not getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            continue
        if not callable(getattr(module, "get_output_embeddings", None)):
            continue
        try:
            one, other = module.get_input_embeddings().weight, module.get_output_embeddings().weight
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one is not other and one.shape == other.shape:
            pair = names.param(one), names.param(other)
            if pair[0] and pair[1] and pair[0] != pair[1] and (one.requires_grad or other.requires_grad):
                found.append((pair[0], pair[1], "config.tie_word_embeddings"))
                break
    return found


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether the values are the same, or were before a cast to half, and perhaps one back, rounded one of them."""
    for part in (slice(0, 4), slice(None)):  # most pairs differ in their first rows
        first, second = one.detach()[part], other.detach()[part]
        if not any(torch.equal(first.to(dtype), second.to(dtype)) for dtype in HALVES):
            return False
    return True


def _untied_by_value(names: Names, root: nn.Module) -> list[tuple[str, str, str]]:
    found = []
    # Embeddings alike are those of a network and its copy, as target networks and teachers are.
    tables = {id(module.weight) for module in root.modules() if isinstance(module, nn.Embedding)}
    trained = [each for each in root.parameters() if each.requires_grad and each.dim() == 2 and id(each) not in tables]
    for module in root.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Embedding) or not isinstance(weight, nn.Parameter) or not weight.requires_grad:
            continue
        for other in trained:
            if other is weight or other.shape != weight.shape or type(other.data) is not Tensor:
                continue
            if other.device.type == "meta" or type(weight.data) is not Tensor or other.device != weight.device:
                continue
            pair = names.param(weight), names.param(other)
            if pair[0] and pair[1] and float(weight.detach().float().std()) > 0 and _are_equal(weight, other):
                found.append((pair[0], pair[1], "equal values"))
    return found
