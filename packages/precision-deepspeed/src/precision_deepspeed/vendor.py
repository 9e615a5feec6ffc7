"""DeepSpeed's process-wide state: its accelerator, its process groups, and the state of its autocast.

DeepSpeed takes seconds to import and writes to standard output while it does, so nothing here happens at import.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

_SHM = "deepspeed_shm_comm"


def supports_float16() -> bool:
    """Whether DeepSpeed's accelerator supports the `fp16` section: not on CPUs without float16 instructions."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def use_accelerator(device_type: str) -> None:
    """Has DeepSpeed use that kind of device.

    Raises:
        ValueError: the variable DS_ACCELERATOR names another one, or DeepSpeed finds no such device.
    """
    from deepspeed.accelerator import get_accelerator, set_accelerator

    found = get_accelerator().device_name()
    if found == device_type:
        return
    if "DS_ACCELERATOR" in os.environ:
        raise ValueError(
            f"the environment has DS_ACCELERATOR={os.environ['DS_ACCELERATOR']!r}, and Fabric runs on {device_type!r}: "
            f"unset it, or pass accelerator={found!r}"
        )
    if device_type != "cpu":
        raise ValueError(f"DeepSpeed finds {found!r} here and no {device_type!r}: pass accelerator={found!r}")
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    set_accelerator(CPU_Accelerator())


@contextmanager
def local_rank_variable(number: int) -> Iterator[None]:
    """Context with the variable LOCAL_RANK, which DeepSpeed requires even in a process that no launcher started."""
    added = "LOCAL_RANK" not in os.environ
    if added:
        os.environ["LOCAL_RANK"] = str(number)
    try:
        yield
    finally:
        if added:
            del os.environ["LOCAL_RANK"]


@contextmanager
def _new_engine() -> Iterator[None]:
    """Context in which an engine is made without the mode of an earlier one.

    `torch_autocast` sets a flag for the process, with which every later engine would get a scaler of torch's.
    DeepSpeed's shared-memory collectives for CPUs are left out: they are for inference on one node, and take minutes to
    compile.
    """
    import deepspeed.ops
    from deepspeed.runtime import torch_autocast

    operations = deepspeed.ops.__compatible_ops__
    shm = operations.get(_SHM)
    operations[_SHM] = False
    torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None
    try:
        yield
    finally:
        operations[_SHM] = shm


def initialize(local_rank: int, **arguments: Any) -> Any:
    """Returns the engine that `deepspeed.initialize` makes in the existing process group; it looks for no MPI."""
    import deepspeed

    with local_rank_variable(local_rank), _new_engine():
        return deepspeed.initialize(dist_init_required=False, **arguments)[0]


def zero_init(local_rank: int, config: dict[str, Any]) -> AbstractContextManager[Any]:
    """Returns the context `deepspeed.zero.Init`, which builds modules in shards, for float32 parameters."""
    import deepspeed

    with local_rank_variable(local_rank), _new_engine():
        deepspeed.init_distributed(dist_init_required=False)
        # Without `dtype`: on a device without float16, DeepSpeed 0.19.8 replaces any dtype that is given by bfloat16.
        context: AbstractContextManager[Any] = deepspeed.zero.Init(config_dict_or_path=config)
        return context


def gathered(params: Iterable[nn.Parameter], writes: bool) -> AbstractContextManager[Any]:
    """Returns a context with sharded parameters gathered; if `writes`, what rank zero wrote to them is kept."""
    sharded = [param for param in params if hasattr(param, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded, 0 if writes else None)
    return context


@contextmanager
def all_reduce_replaced(by: Callable[..., None]) -> Iterator[None]:
    """Context in which DeepSpeed calls `by(all_reduce, tensor, op, group)` in place of its own `all_reduce`."""
    from deepspeed import comm

    all_reduce = comm.all_reduce

    def replaced(tensor: torch.Tensor, op: Any = comm.ReduceOp.SUM, group: Any = None) -> None:
        by(all_reduce, tensor, op, group)

    comm.all_reduce = replaced
    try:
        yield
    finally:
        comm.all_reduce = all_reduce


def give_linear_back() -> None:
    """Restores `torch.nn.functional.linear`, which stage 3 replaces by one that saves no gathered weight."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    torch.nn.functional.linear = getattr(
        InsertPostInitMethodToModuleSubClasses, "linear_bk", torch.nn.functional.linear
    )


def end_process_group() -> None:
    """Destroys the process group, by DeepSpeed's own function if it has made an engine, so that it drops its copy."""
    from deepspeed.comm import comm

    (torch.distributed if comm.cdb is None else comm).destroy_process_group()
