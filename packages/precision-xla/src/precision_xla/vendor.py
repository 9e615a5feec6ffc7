"""All that is asked of torch_xla, and nothing else imports it: an engine that succeeds it implements these functions.

torch_xla takes seconds to import, and sets variables of its own when it is, so it is imported by the first function
that needs it. Its runtime starts with the first question about devices, or the first tensor.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEVICE = "PJRT_DEVICE"
"""The vendor's variable that says which kind of device the runtime starts with."""
CPU_DEVICES = "CPU_NUM_DEVICES"
"""The vendor's variable that says how many devices a CPU is; it is read when the runtime starts."""
SPMD = "XLA_USE_SPMD"
"""The vendor's variable that turns SPMD on from the start."""
SYNC_FREE = "torch_xla.amp.syncfree"
"""The module with optimizers that skip a step on the device; its SGD, Adam and AdamW take `found_inf`."""


# ---------------------------------------------------------------- the runtime


def is_installed() -> bool:
    """Whether there is a torch_xla to import."""
    return "torch_xla" in sys.modules or importlib.util.find_spec("torch_xla") is not None


def is_started() -> bool:
    """Whether the runtime of this process has started: its devices are what they are from then on."""
    if "torch_xla" not in sys.modules:
        return False
    import torch_xla

    return bool(torch_xla._XLAC._xla_runtime_is_initialized())


def hardware() -> str:
    """Returns what the runtime runs on, or would be started on: "TPU", "CPU", or what else the vendor knows."""
    if DEVICE in os.environ:
        return os.environ[DEVICE].partition("_")[0]
    import torch_xla.runtime

    return str(torch_xla.runtime.device_type())  # it looks for TPUs, and takes the CPU where there are none


def choose_hardware(kind: str) -> None:
    """Has the runtime start on "TPU" or "CPU"; raises `RuntimeError` when it has started on another."""
    import torch_xla.runtime

    torch_xla.runtime.set_device_type(kind)


def tpu_chips() -> int:
    """Returns how many TPU chips this machine has; starts nothing."""
    from torch_xla._internal import tpu

    return int(tpu.num_available_chips())


def device_count() -> int:
    """Returns how many devices this process drives; starts the runtime."""
    import torch_xla.runtime

    return int(torch_xla.runtime.addressable_runtime_device_count())


_uses_spmd = False


def use_spmd() -> None:
    """Makes all devices of the process one, whose tensors are sharded; for all of the process; it cannot be undone."""
    global _uses_spmd
    import torch_xla.runtime

    if not torch_xla.runtime.is_spmd():
        torch_xla.runtime.use_spmd()
        _uses_spmd = True


def spmd_variable() -> str | None:
    """Returns what the user's environment has for `SPMD` where that turns it on; `use_spmd` sets it too."""
    value = os.environ.get(SPMD, "")
    return None if _uses_spmd or value.lower() in ("", "0", "false") else value


def device() -> torch.device:
    """Returns the device that is in use, starting the runtime."""
    import torch_xla

    return torch_xla.device()


def check_backward() -> None:
    """Raises `RuntimeError` when no backward can run on XLA devices in this process, and says why.

    torch makes a queue for each device that there is when the first backward runs, and none later.
    """
    try:
        torch.ones(1, device=device(), requires_grad=True).sum().backward()
    except RuntimeError as error:
        if "device_ready_queues_" not in str(error):
            raise
        raise RuntimeError(
            "a backward ran in this process before the XLA runtime started, and torch runs none on devices that come "
            "later: make the Fabric before the first backward"
        ) from error


def sync() -> None:
    """Compiles what is pending, unless it was compiled before, and starts its execution, as one graph."""
    import torch_xla

    torch_xla.sync()


def wait() -> None:
    """Returns when the device has done all that was started."""
    import torch_xla.core.xla_model

    torch_xla.core.xla_model.wait_device_ops()


def set_matmul_precision(precision: str) -> None:
    """Has float32 matrix products computed as "default" (in bfloat16 on a TPU), "high" or "highest" (in float32).

    For the whole process, in all programs compiled from now on; the vendor advises against changing it twice.
    """
    from torch_xla import backends

    if backends.get_mat_mul_precision() != precision:
        backends.set_mat_mul_precision(precision)


# ---------------------------------------------------------------- what was compiled and run


@dataclass(frozen=True)
class Counts:
    """What the runtime did since the process began."""

    compilations: int
    executions: int
    reads: int
    """Transfers from the device to CPU memory: each waits for the device."""

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.compilations - other.compilations, self.executions - other.executions, self.reads - other.reads
        )


def counts() -> Counts:
    """Returns the counts, once what was started is done."""
    import torch_xla.debug.metrics as metrics

    wait()

    def samples(*names: str) -> int:
        found = (metrics.metric_data(name) for name in names)
        return sum(int(each[0]) for each in found if each is not None)

    return Counts(
        samples("CompileTime"),
        samples("ExecuteTime", "ExecuteReplicatedTime"),
        samples("TransferFromDeviceTime"),
    )


def to_cpu(tensors: list[Tensor]) -> list[Tensor]:
    """Returns copies of XLA tensors on the CPU, in one transfer; those of one value are one, so that ties last."""
    import torch_xla

    ids = [torch_xla._XLAC._xla_get_tensor_id(tensor) for tensor in tensors]
    distinct = dict(zip(ids, tensors, strict=True))
    copies = dict(zip(distinct, torch_xla._XLAC._xla_get_cpu_tensors(list(distinct.values())), strict=True))
    return [copies[number] for number in ids]


def hlo(tensors: Iterable[Tensor]) -> str:
    """Returns the program that would compute these tensors from what is on the device, as HLO text."""
    import torch_xla

    return str(torch_xla._XLAC._get_xla_tensors_hlo(list(tensors)))


# ---------------------------------------------------------------- random numbers


class Generators:
    """What core uses of `torch.cuda`, for "xla", which has no such module: the devices and their generator.

    The state of the generator is a Python int. It changes with each random operation and each `sync`.
    """

    @staticmethod
    def is_available() -> bool:
        """Whether torch_xla is installed; which devices there are only the runtime can tell."""
        return is_installed()

    @staticmethod
    def device_count() -> int:
        """Returns how many devices there are; starts the runtime."""
        return device_count()

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Seeds the device's generator; before the runtime starts there is none, and `XLAStrategy` seeds it then."""
        if is_started():
            Generators.set_rng_state(seed)

    @staticmethod
    def get_rng_state(device: torch.device | None = None) -> int:
        """Returns the generator's state."""
        import torch_xla.core.xla_model

        return int(torch_xla.core.xla_model.get_rng_state())

    @staticmethod
    def set_rng_state(state: int, device: torch.device | None = None) -> None:
        """Restores what `get_rng_state` returned."""
        import torch_xla.core.xla_model

        torch_xla.core.xla_model.set_rng_state(state)


# ---------------------------------------------------------------- SPMD


class Mesh:
    """All devices of the process in a row, over which tensors are sharded along one dimension each."""

    def __init__(self) -> None:
        import torch_xla.distributed.spmd as spmd

        self.size = device_count()
        self._mesh = spmd.Mesh(list(range(self.size)), (self.size,), ("devices",))

    def shard(self, tensor: Tensor, dim: int | None) -> None:
        """Marks the tensor as sharded along `dim`, or as replicated; one that is marked already stays."""
        import torch_xla
        import torch_xla.distributed.spmd as spmd

        if not torch_xla._XLAC._get_xla_sharding_spec(tensor):
            spmd.mark_sharding(tensor, self._mesh, self._spec(tensor.dim(), dim))

    def _spec(self, dims: int, dim: int | None) -> tuple[str | None, ...]:
        return tuple("devices" if each == dim else None for each in range(dims))

    def input_spec(self, dims: int) -> Any:
        """Returns how the vendor's transfers shard a batch of so many dimensions: along the first."""
        import torch_xla.distributed.spmd as spmd

        return spmd.ShardingSpec(self._mesh, self._spec(dims, 0))


def sharding(tensor: Tensor) -> str:
    """Returns how the tensor is sharded, in the vendor's words; "" where nothing was said."""
    import torch_xla

    return str(torch_xla._XLAC._get_xla_sharding_spec(tensor))


# ---------------------------------------------------------------- batches


class _InputSharding:
    """What the vendor's transfers take for a sharding spec: one for tensors of any number of dimensions."""

    minibatch = False

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._specs: dict[int, Any] = {}

    def xla_spec(self, tensor: Tensor) -> Any:
        dims = tensor.dim()
        if not dims or len(tensor) < self._mesh.size:
            return None
        if dims not in self._specs:
            self._specs[dims] = self._mesh.input_spec(dims)
        return self._specs[dims].xla_spec(tensor)


def upload(tensors: list[Tensor], device: torch.device, mesh: Mesh | None) -> list[Tensor]:
    """Returns CPU tensors on the device, in one transfer, sharded along their first dimension where there is a mesh."""
    import torch_xla.core.xla_model as xla_model

    return list(xla_model.send_cpu_data_to_device(tensors, device, None if mesh is None else _InputSharding(mesh)))


def upload_ahead(batches: Iterable[list[Tensor]], device: torch.device, mesh: Mesh | None) -> Iterator[list[Tensor]]:
    """Yields batches on the device; the vendor's threads draw and transfer the next ones meanwhile. Syncs at each."""
    from torch_xla.distributed.parallel_loader import ParallelLoader

    loader = ParallelLoader(batches, [device], input_sharding=None if mesh is None else _InputSharding(mesh))
    try:
        yield from loader.per_device_loader(device)
    finally:
        loader.close()
