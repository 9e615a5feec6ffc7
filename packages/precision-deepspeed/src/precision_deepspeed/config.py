"""The config for `deepspeed.initialize`, from a policy and the user's config: one plain function."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

import torch

from precision_core import Policy
from precision_deepspeed.support import NO_FLOAT64, REDUCES_IN_FLOAT32

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_SPELLINGS = {"float32": "fp32", "float": "fp32", "half": "fp16", "float16": "fp16", "bfloat16": "bf16"}
_SECTIONS = ("fp16", "bf16", "torch_autocast")

_NOT_HERE = {
    "optimizer": "pass the optimizer itself: fabric.setup(model, torch.optim.AdamW(...))",
    "scheduler": "make the scheduler yourself and step it after optimizer.step()",
    "amp": "DeepSpeed 0.19.8 has removed apex; 16-mixed is its torch_autocast",
    "bfloat16": 'DeepSpeed calls it "bf16"',
    "managed_gradient_accumulation": "any number of backwards before optimizer.step() accumulate here without it",
}

_NAMES_AT_TOP = """
    activation_checkpointing aio autotuning bf16 checkpoint comms_logger comet communication_data_type compile
    csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last datastates disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level memory_breakdown
    pipeline prescale_gradients seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard
    timers torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
    vocabulary_size wandb wall_clock_breakdown weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization
"""
_KNOWN = frozenset(_NAMES_AT_TOP.split())
"""The top-level keys that DeepSpeed 0.19.8 reads; it ignores others silently."""


def deepspeed_config(policy: Policy | str | int, user_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the config for `deepspeed.initialize`: `user_config` and what `policy` needs.

    Mixed policies are the section `torch_autocast`, with an empty list of layers whose gradients may be reduced in a
    lower dtype than float32; true ones are `bf16` and `fp16`. Gradients are not clipped (DeepSpeed's default is a norm
    of 1.0 since 0.19.4), one step is one backward, any torch optimizer may be used, and nothing is timed.

    Raises:
        ValueError: `user_config` contradicts the policy (the error names both), or a model does not learn with the two.

    Source: https://www.deepspeed.ai/docs/config-json/
    """
    policy = _check_policy(Policy.parse(policy))
    if user_config is not None and not isinstance(user_config, Mapping):
        raise ValueError(f"deepspeed_config(config={user_config!r}): expected a dict; json.load reads one from a file")
    config: dict[str, Any] = copy.deepcopy(dict(user_config or {}))
    for key, way_out in _NOT_HERE.items():
        if key in config:
            raise ValueError(f"config[{key!r}] cannot be used here: {way_out}")
    _check_keys(config)
    _fix(config, "gradient_accumulation_steps", 1, "call fabric.backward several times before optimizer.step()")
    _fix(config, "gradient_clipping", 0.0, "call fabric.clip_gradients(model, optimizer, max_norm=...) before the step")
    if "train_batch_size" not in config:
        config.setdefault("train_micro_batch_size_per_gpu", 1)  # DeepSpeed wants one of them, and only prints it
    config.setdefault("zero_allow_untested_optimizer", True)
    # By default DeepSpeed times every forward and step, and waits for all that the GPU computes to do so.
    config["timers"] = {"throughput": {"enabled": False}, **_table(config, "timers")}
    _set_section(config, policy)
    _set_reduction(config, policy)
    _check_stage(config, policy)
    _check_zero(config)
    return config


def stage_of(config: Mapping[str, Any]) -> int:
    """Returns the ZeRO stage; raises `ValueError` for anything but 0 to 3."""
    stage = _table(config, "zero_optimization").get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO has the stages 0, 1, 2 and 3, not {stage!r}")
    return stage


def has_pure_state(config: Mapping[str, Any] | None) -> bool:
    """Whether the `bf16` section asks for training without float32 master weights."""
    return bool(_table(config or {}, "bf16").get("bf16_master_weights_and_grads"))


def _table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key, {})
    if not isinstance(value, Mapping):
        raise ValueError(f"config[{key!r}] has to be a dict, not {value!r}")
    return value


def _check_policy(policy: Policy) -> Policy:
    """Returns the policy if one of DeepSpeed's sections can run it; the plugin checks the rest, and the hardware."""
    if policy.exceptions:
        raise ValueError(f'precision="{policy}": the engine has one dtype for all layers: no exceptions')
    if not {policy.params, policy.compute, policy.reduce} <= _NAMES.keys():
        raise ValueError(f'precision="{policy}": {NO_FLOAT64}')
    if policy.mixed and policy.reduce is not torch.float32:
        raise ValueError(f'precision="{policy}": {REDUCES_IN_FLOAT32}')
    return policy


def _check_keys(config: Mapping[str, Any]) -> None:
    for key in config.keys() - _KNOWN:
        near = difflib.get_close_matches(str(key), _KNOWN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "leave it out; options of ZeRO go into zero_optimization"
        raise ValueError(f"config[{key!r}] is not a key that DeepSpeed reads: {hint} [engine-config]")
    for key, value in config.items():
        if value == "auto":
            raise ValueError(f'config[{key!r}] is "auto", which the Hugging Face Trainer fills in: leave it out')
    types = _table(config, "data_types")
    for key in types.keys() - {"grad_accum_dtype", "keep_in_fp32_modules"}:
        raise ValueError(f'config["data_types"][{key!r}] cannot be used here: dtypes come from the policy and buffers=')
    if _table(config, "checkpoint").get("load_universal"):
        raise ValueError(
            'config["checkpoint"]["load_universal"] cannot be used here: fabric.load converts between numbers of ranks '
            "and stages without it"
        )


def _check_zero(config: Mapping[str, Any]) -> None:
    zero, stage = _table(config, "zero_optimization"), stage_of(config)
    for key in ("zero_quantized_gradients", "zero_quantized_weights"):
        if zero.get(key):
            raise ValueError(
                f'config["zero_optimization"][{key!r}] sends 8-bit integers, which no policy stands for: leave it out'
            )
    for key, stages in (("offload_param", (3,)), ("offload_optimizer", (1, 2, 3))):
        device = _table(zero, key).get("device", "none") if zero.get(key) is not None else "none"
        if device not in (None, "none") and stage not in stages:
            raise ValueError(
                f'config["zero_optimization"][{key!r}] needs stage={" or ".join(map(str, stages))}, and this is '
                f"stage={stage}, where DeepSpeed ignores it"
            )


def _fix(config: dict[str, Any], key: str, value: float, way_out: str) -> None:
    if config.get(key, value) != value:
        raise ValueError(f"config[{key!r}] is {config[key]!r}, and has to be {value!r} here: {way_out} [engine-config]")
    config[key] = value


def _section(policy: Policy) -> str | None:
    if policy.mixed:
        return "torch_autocast"
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: None}[policy.params]


def _set_section(config: dict[str, Any], policy: Policy) -> None:
    wanted = _section(policy)
    for name in _SECTIONS:
        enabled = _table(config, name).get("enabled", name == wanted)
        if enabled != (name == wanted):
            needs = f'config["{wanted}"]' if wanted else "none of fp16, bf16 and torch_autocast"
            raise ValueError(
                f'config["{name}"]["enabled"] is {enabled!r} and precision="{policy}" needs {needs} enabled: change one'
                " [engine-config]"
            )
        if name != wanted:
            config.pop(name, None)  # DeepSpeed 0.19.8 reads keys of a disabled torch_autocast section too
    if wanted is None:
        return
    section = config[wanted] = {"enabled": True, **_table(config, wanted)}
    if wanted == "torch_autocast":
        name = str(policy.compute).removeprefix("torch.")
        if section.setdefault("dtype", name) not in (name, _NAMES[policy.compute]):
            raise ValueError(
                f'config["torch_autocast"]["dtype"] is {section["dtype"]!r} and precision="{policy}" computes in {name}'
            )
        if section.setdefault("lower_precision_safe_modules", []):
            raise ValueError(
                f'config["torch_autocast"]["lower_precision_safe_modules"] is {section["lower_precision_safe_modules"]}'
                f', whose gradients DeepSpeed reduces in {name}, and precision="{policy}" reduces in '
                f"{policy.reduce}: leave it out"
            )


def _set_reduction(config: dict[str, Any], policy: Policy) -> None:
    name = _NAMES[policy.reduce]
    given = config.get("communication_data_type")
    if given is None:  # None is DeepSpeed's default
        given = config["communication_data_type"] = name
    if _SPELLINGS.get(str(given), given) != name:
        raise ValueError(
            f'config["communication_data_type"] is {given!r} and precision="{policy}" reduces gradients in {name}: set '
            "it in the policy (reduce=...), or leave it out"
        )


def _check_stage(config: dict[str, Any], policy: Policy) -> None:
    stage, section = stage_of(config), _section(policy)
    accumulated = str(_table(config, "data_types").get("grad_accum_dtype"))
    accumulated = _SPELLINGS.get(accumulated, accumulated)
    if stage == 0 and section == "fp16":
        raise ValueError(
            f'precision="{policy}" with stage=0: DeepSpeed runs its fp16 section without ZeRO, but does not learn in '
            "it. Pass stage=1, 2 or 3, or 16-mixed"
        )
    if stage == 0 and has_pure_state(config):
        raise ValueError('config["bf16"]["bf16_master_weights_and_grads"] needs stage=1, 2 or 3, and this is stage=0')
    if stage < 2 and section == "bf16" and accumulated == "fp32":
        raise ValueError(
            f'config["data_types"]["grad_accum_dtype"] is "fp32", which needs stage=2 or 3 here, and this is '
            f"stage={stage}: DeepSpeed does not support it at stage 0, and uses another optimizer for it at stage 1"
        )
    if accumulated not in ("None", *_NAMES.values()):
        raise ValueError(
            f'config["data_types"]["grad_accum_dtype"] is {accumulated!r}: expected one of {", ".join(_NAMES.values())}'
        )
    if policy.params is torch.float32 and accumulated not in ("None", "fp32"):
        raise ValueError(
            f'config["data_types"]["grad_accum_dtype"] is {accumulated!r}, and precision="{policy}" has float32 '
            "gradients"
        )
