"""Every attribute of DeepSpeed's objects that this package reads, calls or replaces: one table, checked on engines.

DeepSpeed documents few of them. A release that renames some fails here with all that are missing, and code that takes
one that the table does not have fails too.
"""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import precision_deepspeed
from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_deepspeed import DeepSpeedStrategy, deepspeed_config, vendor

SOURCES = sorted(Path(precision_deepspeed.__file__).parent.rglob("*.py"))
_ZERO = """
    _backward_active_depth _remaining_grad_acc_hooks averaged_gradients clear_backward_seen_flag clip_grad
    complete_grad_norm_calculation_for_cpu_offload custom_loss_scaler external_loss_scale
    finalize_gradient_accumulation_boundary get_grad_norm_direct ipg_buckets load_state_dict loss_scale loss_scaler
    override_loss_scale overflow params_already_reduced reset_cpu_buffers state_dict torch_autocast_gradscaler
"""

TABLE: dict[str, str] = {
    "engine": """
        _backward_prologue _forward_epilogue _forward_prologue allreduce_gradients backward bfloat16_enabled destroy
        device global_samples global_steps load_checkpoint module module_forward_post_hook module_forward_pre_hook
        optimizer save_checkpoint set_gradient_accumulation_boundary skipped_steps step torch_autocast_z0_gradscaler
        zero_cpu_offload zero_grad zero_nvme_offload_optimizer zero_optimization_partition_gradients
    """,
    "half optimizer": "clip_grad fp16_groups fp32_groups overflow overflow_checker",
    "overflow checker": "has_overflow_serial",
    "zero optimizer": f"""{_ZERO}
        _release_preflattened_grad_buffers all_grad_tensors bit16_groups compute_grad_norm get_gradient_for_reduction
        gradient_accumulation_dtype refresh_fp32_params scaled_global_norm single_partition_of_fp32_groups
        use_grad_accum_attribute zero_grad
    """,
    "offloading optimizer": f"{_ZERO} accumulated_grads_in_cpu",
    "zero3 optimizer": f"""{_ZERO}
        _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition _get_norm_groups _offload_boundary_param_ids
        _overflow_clean_up checkpoint_event_epilogue checkpoint_event_prologue dtype fp32_partitioned_groups_flat
        get_param_id grad_position parameter_offload refresh_fp32_params
    """,
    "offload": "backward_hooks forward_hooks release_backward_leftovers",
    "handle": "hooks_dict_ref id",
    "bucket": "clear",
    "zero3 bucket": "clear_params",
    "evaluated": "destroy module optimizer",
    "evaluated optimizer": "release_backward_leftovers",
    "dynamic scaler": "cur_hysteresis cur_iter cur_scale last_overflow_iter",
    "parameter": "_hp_mapping",
    "accumulating parameter": "grad_accum",
    "zero3 parameter": "ds_id ds_shape",
    "mapping": "hp_fragment_address lp_fragment_address param_group_index",
    "address": "numel start",
    "accelerator": "device_name is_fp16_supported",
    "deepspeed": "comm init_distributed initialize ops zero",
    "deepspeed.zero": "GatheredParameters Init",
    "deepspeed.accelerator": "get_accelerator set_accelerator",
    "deepspeed.accelerator.cpu_accelerator": "CPU_Accelerator",
    "deepspeed.comm": "ReduceOp all_reduce comm",
    "deepspeed.comm.comm": "cdb destroy_process_group",
    "deepspeed.ops": "__compatible_ops__",
    "deepspeed.runtime": "torch_autocast",
    "deepspeed.runtime.torch_autocast": "TORCH_AUTOCAST_DTYPE TORCH_AUTOCAST_INITIALIZED",
    "deepspeed.runtime.fp16.loss_scaler": "DynamicLossScaler LossScaler",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.runtime.zero.partition_parameters": "InsertPostInitMethodToModuleSubClasses",
    "deepspeed.runtime.zero.partition_parameters.InsertPostInitMethodToModuleSubClasses": "linear_bk",
    "deepspeed.utils.tensor_fragment": "fragment_address",
}
"""Kind of object -> what is used of it."""

PLURAL = {"_evaluated": "engine", "ipg_buckets": "bucket", "forward_hooks": "handle", "backward_hooks": "handle"}
LEAD_TO = {
    **PLURAL,
    **dict.fromkeys(("vendor", "_vendor"), "engine"),
    "_zero": "optimizer",
    "parameter_offload": "offload",
    "_live": "scaler",
    "overflow_checker": "checker",
    "_hp_mapping": "mapping",
    **dict.fromkeys(("hp_fragment_address", "lp_fragment_address"), "address"),
}
"""Name of an attribute -> the kind of what is in it, or of its items."""


# ---------------------------------------------------------------- real objects

_FLOAT32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

ENGINES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "stage 0": (0, "32-true", {}),
    "stage 0 over bfloat16": (0, "bf16-true", {}),
    "stage 1": (1, "32-true", {}),
    "stage 2": (2, "32-true", {}),
    "stage 2 with offload_optimizer": (2, "32-true", {"zero_force_ds_cpu_optimizer": False, **_OFFLOAD}),
    "stage 2 in 16-true": (2, "16-true", {}),
    "stage 2 with gradients in float32": (2, "bf16-true", _FLOAT32_GRADIENTS),
    "stage 3": (3, "32-true", {}),
    "stage 3 without an optimizer": (3, "32-true", {}),
}
"""What for a reader -> stage, mode and config of an engine."""

Reach = Callable[[Any], Any]
_OPTIMIZER: Reach = attrgetter("optimizer")
_HOOK: Reach = attrgetter("optimizer.parameter_offload")

OBJECTS: tuple[tuple[str, str, str, Reach], ...] = (
    *(("engine", f"stage {stage}", "engine", lambda engine: engine) for stage in range(4)),
    ("half optimizer", "stage 0 over bfloat16", "optimizer", _OPTIMIZER),
    ("overflow checker", "stage 0 over bfloat16", "checker", attrgetter("optimizer.overflow_checker")),
    *(("zero optimizer", f"stage {stage}", "optimizer", _OPTIMIZER) for stage in (1, 2)),
    *(("bucket", f"stage {stage}", "bucket", lambda engine: bucket(engine)) for stage in (1, 2)),
    ("parameter", "stage 2", "parameter", lambda engine: parameter(engine)),
    ("mapping", "stage 2", "_hp_mapping", lambda engine: parameter(engine)._hp_mapping),
    ("address", "stage 2", "hp_fragment_address", lambda engine: parameter(engine)._hp_mapping.hp_fragment_address),
    ("address", "stage 2", "lp_fragment_address", lambda engine: parameter(engine)._hp_mapping.lp_fragment_address),
    ("offloading optimizer", "stage 2 with offload_optimizer", "optimizer", _OPTIMIZER),
    ("dynamic scaler", "stage 2 in 16-true", "scaler", attrgetter("optimizer.loss_scaler")),
    ("accumulating parameter", "stage 2 with gradients in float32", "parameter", lambda engine: parameter(engine)),
    ("zero3 optimizer", "stage 3", "optimizer", _OPTIMIZER),
    ("offload", "stage 3", "parameter_offload", _HOOK),
    ("handle", "stage 3", "hook", lambda engine: engine.optimizer.parameter_offload.forward_hooks[0]),
    ("zero3 parameter", "stage 3", "parameter", lambda engine: parameter(engine)),
    ("zero3 bucket", "stage 3", "bucket", lambda engine: bucket(engine)),
    ("evaluated", "stage 3 without an optimizer", "engine", lambda engine: engine),
    ("evaluated optimizer", "stage 3 without an optimizer", "optimizer", _OPTIMIZER),
)
"""Kind, the engine by its name, what for a reader, and the way from the engine to the object."""


def parameter(engine: Any) -> Any:
    return next(iter(engine.module.parameters()))


def bucket(engine: Any) -> Any:
    return next(iter(engine.optimizer.ipg_buckets.values()))


def engine_of(stage: int, mode: str, config: dict[str, Any], trains: bool) -> Any:
    """Returns an engine of DeepSpeed's alone, of which nothing of ours has taken anything."""
    config = {**config, "zero_optimization": {"stage": stage, **{k: config[k] for k in config.keys() & _OFFLOAD}}}
    config.pop("offload_optimizer", None)
    model = nn.Linear(4, 1).to({"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(mode, torch.float32))
    optimizer = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)} if trains else {}
    return vendor.initialize(0, model=model, config=deepspeed_config(mode, config), **optimizer)


def has(value: Any, name: str) -> bool:
    """Whether DeepSpeed gives it the attribute: what the engine has of the user's module does not count."""
    if not isinstance(value, nn.Module):
        return hasattr(value, name)
    own = [cls for cls in type(value).__mro__ if cls.__module__.startswith("deepspeed")]
    return name in vars(value) or name in value._modules or any(name in vars(cls) for cls in own)


def lacking(table: dict[str, str]) -> list[str]:
    """Returns a line for each object that lacks something, or that there is no way to."""
    Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(0)).launch()  # the process group
    patch = pytest.MonkeyPatch()
    patch.setattr(
        type(pkgutil.resolve_name("deepspeed.accelerator.get_accelerator")()), "is_fp16_supported", lambda self: True
    )
    lines: list[str] = []

    def check(kind: str, what: str, reach: Callable[[], Any]) -> None:
        try:
            value = reach()
        except Exception as error:
            lines.append(f"{what}: {type(error).__name__}: {error}")
            return
        names = [name for name in table[kind].split() if not has(value, name)]
        if names:
            lines.append(f"{what} has no {', '.join(names)}")

    engines = {}
    for name, settings in ENGINES.items():
        try:
            engines[name] = engine_of(*settings, trains=not name.endswith("without an optimizer"))
        except Exception as error:
            lines.append(f"no engine at {name}: {type(error).__name__}: {error}")
    for kind, name, what, reach in OBJECTS:
        if name in engines:
            check(kind, f"the {what} at {name}", lambda reach=reach, name=name: reach(engines[name]))  # type: ignore[misc]
    for kind in table:
        if kind.startswith("deepspeed"):
            check(kind, kind, lambda kind=kind: pkgutil.resolve_name(kind))  # type: ignore[misc]
    check("accelerator", "the accelerator", lambda: pkgutil.resolve_name("deepspeed.accelerator.get_accelerator")())
    patch.undo()
    return lines


def test_deepspeed_has_all_that_is_used() -> None:
    others = {kind for kind in TABLE if kind.startswith("deepspeed")} | {"accelerator"}
    assert others | {kind for kind, *_ in OBJECTS} == TABLE.keys()
    (lines,) = run_in_ranks(1, lacking, TABLE)
    assert not lines, "\n".join([f"deepspeed {version('deepspeed')}:", *lines])


def test_all_that_is_missing_is_named() -> None:
    table = {"engine": "step weight _gone", "address": "start stop", "deepspeed.gone": "never"}
    (lines,) = run_in_ranks(1, lacking, dict.fromkeys(TABLE, "") | table)
    assert lines == [
        *(f"the engine at stage {stage} has no weight, _gone" for stage in range(4)),  # the user's module has a weight
        "the hp_fragment_address at stage 2 has no stop",
        "the lp_fragment_address at stage 2 has no stop",
        "deepspeed.gone: AttributeError: module 'deepspeed' has no attribute 'gone'",
    ]


# ---------------------------------------------------------------- our source


def test_what_the_source_uses_is_in_the_table() -> None:
    listed: dict[str, set[str]] = {kind: set() for kind in ("engine", "optimizer", *LEAD_TO.values())}
    for kind, names in TABLE.items():
        general = {"evaluated": "engine"}.get(kind, kind.split()[-1])
        if general in listed:
            listed[general] |= set(names.split())
    used = {(path.name, *use) for path in SOURCES for use in uses(ast.parse(path.read_text()))}
    assert {kind for _, kind, _ in used} == listed.keys() - {"scaler"}  # whose names stand in a table of their own
    unlisted = [f"{file}: {kind}.{name}" for file, kind, name in sorted(used) if name not in listed[kind]]
    assert not unlisted, "TABLE has no\n" + "\n".join(unlisted)


def test_what_the_source_imports_is_in_the_table() -> None:
    used = set()
    for node in (node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "deepspeed":
            used |= {(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("deepspeed."):
            used.add((ast.unparse(node.value), node.attr))
    assert len(used) > 10
    assert not [use for use in sorted(used) if use[1] not in TABLE.get(use[0], "").split()]


def test_what_the_table_has_is_used() -> None:
    mentioned: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                mentioned.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                mentioned.add(node.value)
            elif isinstance(node, ast.ImportFrom):
                mentioned |= {alias.name for alias in node.names}
    assert not {name for names in TABLE.values() for name in names.split()} - mentioned


@pytest.mark.parametrize(
    "code",
    [
        "def f(self): self.vendor.gone()",
        "def f(vendor): vendor.optimizer.gone = 1",
        "def f(self):\n    zero = self._zero\n    return [zero.gone for _ in ()]",
        "def f(self):\n    for each in self._zero.ipg_buckets.values(): each.gone()",
        "def f(self): return getattr(self.vendor.optimizer.parameter_offload, 'gone', None)",
        "def f(self):\n    for hook in (*self._zero.parameter_offload.forward_hooks,): hook.gone()",
        "def f(s):\n    one = next((each for each in s._evaluated if each), None)\n    return lambda: one.gone",
        "def f(self):\n    made = vendor.initialize(1)\n    made.gone()",
    ],
)
def test_the_scan_finds(code: str) -> None:
    assert "gone" in {name for _, name in uses(ast.parse(code))}


def uses(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields kind and name of the attributes that code takes of DeepSpeed's objects."""
    for function in tree.body if isinstance(tree, ast.Module | ast.ClassDef) else ():
        if isinstance(function, ast.ClassDef):
            yield from uses(function)
        if isinstance(function, ast.FunctionDef):
            kinds = variables(function)
            for node in ast.walk(function):
                value, name = taken(node)
                kind = None if value is None else kind_of(value, kinds)
                of_ours = isinstance(value, ast.Name) and hasattr(vendor, name)  # the module is called vendor too
                of_all = isinstance(value, ast.Attribute) and value.attr in PLURAL
                if kind is not None and not of_ours and not of_all:
                    yield kind, name


def taken(node: ast.AST) -> tuple[ast.expr | None, str]:
    """Returns the object and the name of an attribute, also where `getattr` and the like take it."""
    if isinstance(node, ast.Attribute):
        return node.value, node.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
        name = node.args[1]
        if isinstance(name, ast.Constant):
            return node.args[0], str(name.value)
    return None, ""


def variables(function: ast.FunctionDef) -> dict[str, str]:
    """Returns the kinds of the variables in a function, from what they are assigned."""
    kinds: dict[str, str] = {"vendor": "engine"}
    if any(each.arg == "offload" for each in function.args.args):
        kinds["offload"] = "offload"
    for node in ast.walk(function):
        pairs: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = [*zip(target.elts, node.value.elts, strict=True)]
            else:
                pairs = [(target, node.value)]
        elif isinstance(node, ast.For | ast.comprehension):
            pairs = [(node.target, node.iter)]
        for name, value in pairs:
            kind = kind_of(value, kinds)
            if isinstance(name, ast.Name) and kind is not None:
                kinds[name.id] = kind
    return kinds


def kind_of(value: ast.expr, kinds: dict[str, str]) -> str | None:
    """Returns the kind of DeepSpeed's object that an expression is, or of its items."""
    if isinstance(value, ast.Name):
        return kinds.get(value.id)
    if isinstance(value, ast.Attribute):
        if value.attr == "optimizer":
            return "optimizer" if kind_of(value.value, kinds) == "engine" else None
        return LEAD_TO.get(value.attr)
    if isinstance(value, ast.Starred):
        return kind_of(value.value, kinds)
    if isinstance(value, ast.Tuple) and value.elts:
        return kind_of(value.elts[0], kinds)
    if isinstance(value, ast.GeneratorExp):
        return kind_of(value.generators[0].iter, kinds)
    if isinstance(value, ast.Call):
        called = ast.unparse(value.func)
        if called.endswith("initialize"):
            return "engine"
        if called == "next":
            return kind_of(value.args[0], kinds)
        if called == "getattr" and isinstance(value.args[1], ast.Constant):
            return LEAD_TO.get(str(value.args[1].value))
        if called.endswith(".values"):
            return kind_of(value.func.value, kinds)  # type: ignore[attr-defined]
    return None
