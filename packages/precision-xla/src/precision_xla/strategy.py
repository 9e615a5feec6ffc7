"""XLAStrategy: XLA devices (torch_xla): one step is one compiled graph, several devices are one by SPMD."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adafactor, Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from precision_core import Policy, Precision, Strategy
from precision_core.data import DeviceLoader
from precision_core.policy import map_tensors
from precision_core.scaling import takes_flag
from precision_core.strategies import Layout, Ranks
from precision_xla import vendor
from precision_xla.devices import Plan, plan
from precision_xla.environment import check_environment
from precision_xla.hardware import answer, register
from precision_xla.loader import XLALoader
from precision_xla.placement import check_movable, move, move_state
from precision_xla.precision import XLAPrecision

_READS: dict[type[Optimizer], str] = {
    LBFGS: "the loss and several norms in each iteration",
    Adafactor: "two norms of each parameter",
}
"""torch's optimizers that read values from the device in a step, and what; each read waits for the device."""


class XLAStrategy(Strategy):
    """One process on one XLA device, or on several that SPMD makes one.

    A step of the optimizer ends with `torch_xla.sync()`, so that forward, backward, clipping and the step are one
    graph, compiled once and executed once. With several devices `world_size` is 1: the process sees the global batch,
    sharded over the devices, and parameters are sharded along the first dimension that the number of devices divides.
    It stays the same object, with its class and state_dict keys.

    Args:
        spmd: several devices are one, in one process; nothing else is supported.
        shard_parameters: under SPMD, shard parameters, and with them gradients and optimizer state; False replicates
            all of them on each device.
        matmul_precision: of float32 matrix products: "highest" is float32; "high" and "default" are three and one
            passes in bfloat16 on a TPU. None: "highest" on a TPU, where the vendor's default is one pass; as it is
            elsewhere. It is a setting of the process, as the vendor has it.

    Raises:
        ValueError: an unknown `matmul_precision`, `spmd=False`.
    """

    name = "xla"

    def __init__(
        self, *, spmd: bool = True, shard_parameters: bool = True, matmul_precision: str | None = None
    ) -> None:
        if matmul_precision not in (None, "default", "high", "highest"):
            raise ValueError(f"XLAStrategy(matmul_precision={matmul_precision!r}): allowed are default, high, highest")
        if spmd is not True:
            raise ValueError(
                f"XLAStrategy(spmd={spmd!r}): one process for each device is not supported, as nobody has run it. "
                "Leave spmd out: one process drives all devices as one, Fabric(devices=8)"
            )
        register()
        self._shards_parameters = shard_parameters
        self._matmul_precision = matmul_precision
        self._plan: Plan | None = None
        self._mesh: vendor.Mesh | None = None

    # ---------------------------------------------------------------- devices

    def lay_out(self, accelerator: str, devices: int | str | Sequence[int], num_nodes: int) -> Layout:
        """Returns the layout, one process; the runtime is not started for it, but for TPUs.

        Raises:
            ValueError: devices that are not here, a variable of the vendor's that contradicts the arguments, or a
                runtime that has started with other devices.
        """
        check_environment()
        self._plan = plan(accelerator, devices, num_nodes)
        self.device = torch.device("xla", 0)
        return self._plan.layout

    def join(self, ranks: Ranks) -> None:
        """Starts the runtime, on the hardware and devices that were asked for."""
        assert self._plan is not None
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._moved = WeakIdKeyDictionary()
        self._mesh = None
        fresh = not vendor.is_started()
        if fresh:
            vendor.choose_hardware(self._plan.hardware)
        if self._matmul_precision or self._plan.hardware == "TPU":
            vendor.set_matmul_precision(self._matmul_precision or "highest")
        if self._plan.devices > 1:
            vendor.use_spmd()
            self._mesh = vendor.Mesh()
        self.device = vendor.device()
        vendor.check_backward()
        if fresh:
            vendor.Generators.set_rng_state(torch.initial_seed())  # what was seeded before there was a device

    # ---------------------------------------------------------------- precision

    def make_precision(self, policy: Policy) -> Precision:
        """Returns the plugin for a mode that was given as a string: `XLAPrecision`."""
        return XLAPrecision(policy)

    def refuses(self, precision: Precision) -> str | None:
        """Returns why not: a dtype that the hardware lacks."""
        assert self._plan is not None
        level, reason = answer(precision.policy, self._plan.hardware)
        return reason if level == "no" else None

    # ---------------------------------------------------------------- set-up

    def check_optimizers(self, module: nn.Module | None, optimizers: Sequence[Optimizer]) -> None:
        """Raises `ValueError` for fused optimizers, of which XLA has none; takes note of the others."""
        for optimizer in optimizers:
            if any(group.get("fused") for group in optimizer.param_groups):
                raise ValueError(
                    f"{type(optimizer).__name__}(fused=True) has no kernel for XLA devices: leave fused out, the "
                    "compiler fuses the step with the rest of the graph"
                )
            move_state(optimizer, self._moved)
            self._optimizers.add(optimizer)

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Moves the module to the device, ties and hooks kept, and marks the shardings of its parameters."""
        check_movable(module)
        moved = move(module, self.device, self._moved)
        self._moved.update(moved)
        for optimizer in self._optimizers:
            move_state(optimizer, moved)
        if self._mesh is not None:
            for param in module.parameters():
                self._mesh.shard(param.data, self._dim_of(param))
        return module

    def _dim_of(self, param: Tensor) -> int | None:
        """Returns the dimension along which a parameter is sharded: the first that the number of devices divides."""
        assert self._mesh is not None
        if not self._shards_parameters:
            return None
        return next((dim for dim, size in enumerate(param.shape) if size and size % self._mesh.size == 0), None)

    def setup_together(self, module: nn.Module | None, optimizers: tuple[Optimizer, ...]) -> None:
        """Adds to the report what syncs with the device in each step, and executes what setup has recorded."""
        for optimizer in optimizers:
            for note in self._reads_of(optimizer):
                self.precision.note(note)
        vendor.sync()

    def _reads_of(self, optimizer: Optimizer) -> Iterator[str]:
        kind = type(optimizer)
        if self.precision.policy.scale and not takes_flag(optimizer):
            yield (
                f"{kind.__name__} reads one value from the device in each step, whether a gradient overflowed: "
                f"{vendor.SYNC_FREE}.{_sync_free_of(kind)} skips the step on the device"
            )
        for known, what in _READS.items():
            if isinstance(optimizer, known):
                yield f"{kind.__name__} reads values from the device in each step: {what}"

    def make_loader(self, loader: Iterable[Any]) -> DeviceLoader:
        """Returns what brings the loader's batches to the device, sharded, and ends the graph at each."""
        return XLALoader(loader, self.device, self._mesh)

    def make_outer_forward(self, module: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
        """Returns what shards the inputs along their first dimension, where there are several devices."""
        mesh = self._mesh
        if mesh is None:
            return None

        def shard(tensor: Tensor) -> Tensor:
            if tensor.dim() and len(tensor) >= mesh.size and tensor.device.type == "xla":
                mesh.shard(tensor, 0)
            return tensor

        def make(function: Callable[..., Any]) -> Callable[..., Any]:
            def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                map_tensors((args, kwargs), shard)
                return function(self, *args, **kwargs)

            return forward

        return make

    # ---------------------------------------------------------------- step

    def sync(self) -> None:
        """Ends the graph: what is pending is compiled, unless it was before, and executed. Reading a value does, too.

        `optimizer.step()` and each batch of a loader from `fabric.setup_dataloaders` call it. A loop without either, an
        evaluation say that adds up losses, calls it once a batch, or its graph grows until a value is read.
        """
        vendor.sync()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """Steps the optimizer as the precision says, and ends the graph."""
        result = super().optimizer_step(optimizer, closure, **kwargs)
        self.sync()
        return result

    # ---------------------------------------------------------------- checkpoints

    def to_cpu(self, content: dict[str, Any]) -> dict[str, Any]:
        """Returns the content with full tensors on the CPU, so that it loads where there is no torch_xla."""
        found: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.device.type == "xla":
                found.setdefault(id(tensor), tensor)
            return tensor

        map_tensors(content, keep)
        copies = dict(zip(found, vendor.to_cpu(list(found.values())), strict=True))
        return map_tensors(content, lambda tensor: copies.get(id(tensor), tensor))

    def teardown(self) -> None:
        """Forgets what was moved; the runtime stays as it is, since it cannot be started twice in a process."""
        self._moved.clear()


def _sync_free_of(kind: type[Optimizer]) -> str:
    return kind.__name__ if kind.__name__ in ("SGD", "Adam", "AdamW") else "SGD, Adam or AdamW"
