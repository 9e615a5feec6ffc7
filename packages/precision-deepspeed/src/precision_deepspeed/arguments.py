"""Checks of what users pass: the strategy's arguments, as one config, and the model and optimizer for an engine."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Adagrad, Optimizer

from precision_core.strategies import Layout

_CPU_OFFLOAD = {"device": "cpu"}
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}
_BY_SHAPE = ("adafactor", "muon", "sparseadam", "lamb", "lars", "shampoo", "soap")


def config_of(
    stage: int, config: Mapping[str, Any] | None, offload_optimizer: bool, offload_parameters: bool
) -> dict[str, Any]:
    """Returns `config` with the arguments in it."""
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(f"DeepSpeedStrategy(config={config!r}): expected a dict; json.load reads one from a file")
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ValueError(f"DeepSpeedStrategy(stage={stage!r}): ZeRO has the stages 0, 1, 2 and 3")
    for name, given in (("offload_optimizer", offload_optimizer), ("offload_parameters", offload_parameters)):
        if not isinstance(given, bool):
            raise ValueError(
                f"DeepSpeedStrategy({name}={given!r}): True offloads to CPU memory; other devices are set in "
                'config={"zero_optimization": ...}'
            )
    if offload_parameters and stage != 3:
        raise ValueError(f"DeepSpeedStrategy(offload_parameters=True) needs stage=3, not {stage}")
    if offload_optimizer and stage == 0:
        raise ValueError("DeepSpeedStrategy(offload_optimizer=True) needs stage=1, 2 or 3: stage 0 shards nothing")
    made = copy.deepcopy(dict(config or {}))
    zero = made.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f'config["zero_optimization"] has to be a dict, not {zero!r}')
    if zero.setdefault("stage", stage) != stage:
        raise ValueError(
            f'DeepSpeedStrategy(stage={stage}) and config["zero_optimization"]["stage"] = {zero["stage"]!r} contradict '
            "each other"
        )
    for name, given, key in (
        ("offload_optimizer", offload_optimizer, "offload_optimizer"),
        ("offload_parameters", offload_parameters, "offload_param"),
    ):
        section = zero.get(key)
        if given and section is not None and (not isinstance(section, dict) or section.get("device") in (None, "none")):
            raise ValueError(
                f'DeepSpeedStrategy({name}=True) and config["zero_optimization"]["{key}"] = {section!r} contradict '
                "each other"
            )
        if given:
            zero[key] = section or dict(_CPU_OFFLOAD)
    if "offload_optimizer" in zero:
        made.setdefault("zero_force_ds_cpu_optimizer", False)  # the user's torch optimizer steps there as well
    return made


def check_devices(layout: Layout) -> None:
    """Raises `ValueError` for GPUs other than those with the local ranks' numbers, where DeepSpeed puts the models."""
    indices, kind = list(layout.indices), layout.device_type
    if kind not in _VISIBLE or indices == list(range(len(indices))):
        return
    variable = _VISIBLE[kind]
    visible = [name for name in os.environ.get(variable, "").split(",") if name]
    names = [visible[index] if index < len(visible) else str(index) for index in indices]
    raise ValueError(
        f"Fabric(devices={indices}): DeepSpeed puts the model of the first process on {kind}:0, of the second on "
        f"{kind}:1, and so on, whatever the devices. Start the script with {variable}={','.join(names)} and pass "
        f"devices={len(indices)}"
    )


def check_optimizer(optimizer: Optimizer, stage: int) -> None:
    """Raises `ValueError` for an optimizer that the engine would change or step differently."""
    name = type(optimizer).__name__
    if any(float(state.get("step", 1)) for state in optimizer.state.values()):  # Adagrad's is there from the start
        raise ValueError(
            f"this {name} has state, which DeepSpeed discards when it takes the optimizer over: call fabric.setup "
            "first, then load the checkpoint with fabric.load [sharded-optimizer]"
        )
    if stage > 0 and any(cls.__name__.lower() in _BY_SHAPE for cls in type(optimizer).__mro__):
        raise ValueError(
            f"{name} looks at the shape of each parameter, and under ZeRO an optimizer steps flat shards of many "
            "parameters: use an elementwise one (AdamW, SGD), or pass stage=0 [sharded-optimizer]"
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if isinstance(optimizer, Adagrad) and (stage > 0 or any(param.dtype is not torch.float32 for param in params)):
        raise ValueError(
            "DeepSpeed replaces this optimizer by an Adagrad of its own, which has other parameter groups, so that "
            "schedulers do not reach it: use another optimizer, or stage=0 with float32 parameters"
        )


def check_together(
    module: nn.Module | None, optimizers: tuple[Optimizer, ...], stage: int, is_taken: bool
) -> tuple[nn.Module, Optimizer]:
    """Returns the model and its one optimizer; raises `ValueError` for what an engine cannot train."""
    if module is None:
        raise ValueError("DeepSpeed's engine takes model and optimizer together: fabric.setup(model, optimizer)")
    if len(optimizers) > 1:
        raise ValueError(
            f"DeepSpeed's engine steps one optimizer, and fabric.setup got {len(optimizers)}: give one optimizer "
            "several parameter groups"
        )
    optimizer = optimizers[0]
    stepped = {param for group in optimizer.param_groups for param in group["params"]}
    if not stepped <= set(module.parameters()):
        raise ValueError(
            f"this {type(optimizer).__name__} holds parameters of another model: an engine has one model, and an "
            "optimizer of its parameters"
        )
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times a step, which DeepSpeed's engine does not support"
            " [closure-optimizer]"
        )
    if is_taken:
        raise ValueError(
            "DeepSpeedStrategy trains one model: the backward of a second one would run through the first one's "
            "engine. Combine both in one nn.Module, or make another Fabric"
        )
    params = dict(module.named_parameters())
    numbers = [name for name, param in params.items() if not getattr(param, "ds_shape", param.shape)]
    if numbers:
        raise ValueError(f"DeepSpeed's engine does not support scalar parameters: give {numbers[:10]} the shape (1,)")
    left = [name for name, param in params.items() if param.requires_grad and param not in stepped]
    if stage == 3 and left:
        raise ValueError(
            f"{left[:10]} train and are in no group of the optimizer: at stage 3 DeepSpeed writes them to no "
            "checkpoint. Add them to the optimizer, or freeze them with requires_grad_(False)"
        )
    return module, optimizer
