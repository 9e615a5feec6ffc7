"""FSDPStrategy: parameters, gradients and optimizer state in shards over the processes (torch's FSDP2)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from precision_core import Policy, Precision, Strategy
from precision_core.override import override, uncompiled
from precision_core.strategies import Ranks, TorchGroup, join
from precision_fsdp.arguments import check_arguments, check_reshard, make_mesh
from precision_fsdp.copies import refuse_copies
from precision_fsdp.fake import outside_of_modes
from precision_fsdp.from_file import Empty, check_filled, expect, leave_empty
from precision_fsdp.groups import make_groups
from precision_fsdp.limits import check_can_shard
from precision_fsdp.materialise import InitFn, check_can_initialise, is_on_meta, materialise
from precision_fsdp.notes import notes_of
from precision_fsdp.optimizers import Members, check_members, check_optimizer
from precision_fsdp.policies import check_fsdp_policy, overridden
from precision_fsdp.precision import FSDPPrecision
from precision_fsdp.recompute import recompute, to_recompute
from precision_fsdp.recovery import begin_anew, check_not_lost
from precision_fsdp.second_order import check_first_order, explained, first_order
from precision_fsdp.selection import Selection, check_selection, repeated_blocks, select
from precision_fsdp.start import send
from precision_fsdp.unsynced import Unsynced, drop, dropping, followed_by
from precision_fsdp.wide_gradients import keep_wide, why_not

_OWN_POLICY = "_policy_before_fsdp"


class FSDPStrategy(Strategy):
    """One process a device; each holds a shard of every parameter, its gradient and its optimizer state.

    The model is sharded in place: it keeps its attributes and keys. FSDP2 swaps its class for a subclass, and a model
    that is set up can be neither copied nor pickled.

    Args:
        mixed_precision: torch's `MixedPrecision` or `MixedPrecisionPolicy`, whose reduce, buffer and output dtypes win
            over the precision's; None: as the precision says. Its fields on inputs are not read.
        wrap: which modules are gathered each by itself, the rest is gathered with the root: classes, names of classes
            or modules, predicates of (name, module). None: the repeated block, the class of the members of the longest
            `nn.ModuleList`s; where there is none, the root alone.
        reshard_after_forward: free gathered parameters after forward, and gather them again for backward; False keeps
            them; a number of processes gathers among so many for backward.
        mesh: the processes, as a `DeviceMesh` of one or two dimensions, or its shape: (replicas, shards) keeps so many
            replicas of the model, each in so many shards (HSDP).
        activation_checkpointing: blocks that compute their activations again in backward: True for those of `wrap`, or
            a selection such as `wrap` takes.
        cpu_offload: keep shards and optimizer state in CPU memory; needs an accelerator.
        state_dict_type: "sharded" or "full", what checkpoints hold.
        init_fn: how a module's own parameters and buffers are initialised when the model was built in
            `fabric.init_module()`; None: by its `reset_parameters()`.
        backend: of torch.distributed ("gloo", "nccl", ...); None is gloo on CPUs, and nccl or xccl beside it on GPUs.
        timeout: how long a process waits for the others in a collective; None is torch's default.

    Raises:
        ValueError: an invalid argument.
    """

    name = "fsdp"
    multiprocess = True
    keeps_wide_gradients = True
    sharded = True

    def __init__(
        self,
        mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None,
        *,
        wrap: Selection | None = None,
        reshard_after_forward: bool | int = True,
        mesh: DeviceMesh | tuple[int, ...] | None = None,
        activation_checkpointing: bool | Selection | None = None,
        cpu_offload: bool = False,
        state_dict_type: str = "sharded",
        init_fn: InitFn | None = None,
        backend: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        check_arguments(
            {
                "reshard_after_forward": reshard_after_forward,
                "mesh": mesh,
                "cpu_offload": cpu_offload,
                "state_dict_type": state_dict_type,
                "init_fn": init_fn,
                "backend": backend,
                "timeout": timeout,
            }
        )
        self._mixed_precision = check_fsdp_policy(mixed_precision)
        self._wrap = None if wrap is None else check_selection("wrap", wrap)
        self._reshard_after_forward = reshard_after_forward
        self._mesh = mesh
        self._recompute = (
            activation_checkpointing
            if activation_checkpointing is None or isinstance(activation_checkpointing, bool)
            else check_selection("activation_checkpointing", activation_checkpointing)
        )
        self._cpu_offload = cpu_offload
        self.sharded = state_dict_type == "sharded"
        self._init_fn = init_fn
        self.backend = backend
        self.timeout = timeout
        self._made_group = False
        self._restores = ExitStack()
        self._device_mesh: DeviceMesh | None = None
        self._unsynced = Unsynced()
        self._members = Members()
        self._empty = Empty()

    # ---------------------------------------------------------------- processes

    def join(self, ranks: Ranks) -> None:
        """Joins the other processes of the run."""
        self._wide: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose gradients are kept wide
        self._made_group = join(ranks, self.device, self.backend, self.timeout)
        self.group = TorchGroup(ranks, self.device)

    # ---------------------------------------------------------------- precision

    def make_precision(self, policy: Policy) -> Precision:
        """Returns the plugin for a mode that was given as a string: `FSDPPrecision`."""
        return FSDPPrecision(policy)

    def refuses(self, precision: Precision) -> str | None:
        """Returns why not: dtypes that contradict `mixed_precision`, or a device that FSDP does not run on."""
        if self.device.type == "mps":
            return "torch.distributed has no collectives on mps: use one device, or accelerator='cpu'"
        if self._cpu_offload and self.device.type == "cpu":
            return (
                "cpu_offload=True needs an accelerator to offload from, and on a CPU all is there already: leave it out"
            )
        try:
            return why_not(overridden(precision.policy, self._mixed_precision)[0])
        except ValueError as error:
            return str(error)

    def connect(self, precision: Precision) -> None:
        """Ties the plugin to this strategy; its policy takes what `mixed_precision` says."""
        own: Policy = vars(precision).setdefault(_OWN_POLICY, precision.policy)  # of a plugin that is used again
        precision.policy, self._notes = overridden(own, self._mixed_precision)
        super().connect(precision)

    # ---------------------------------------------------------------- set-up

    @contextmanager
    def module_init_context(self, precision: Precision) -> Iterator[None]:
        """Context in which modules are built without values, on meta; setup gives each rank its shards of them."""
        with torch.device("meta"), precision.module_init_context():
            yield

    def left_to_a_file(self) -> AbstractContextManager[None]:
        """Context in which modules are built that get no values at setup, but from a file after it."""
        return self._empty.building()

    def check_optimizers(self, module: nn.Module | None, optimizers: Sequence[Optimizer]) -> None:
        """Checks the optimizers, and that each holds parameters of `module` alone, or none of them.

        Raises:
            ValueError: one that cannot step shards, has state for unsharded parameters, or holds parameters of `module`
                and others beside them.
        """
        for optimizer in optimizers:
            check_optimizer(optimizer)
            if module is not None:
                check_members(optimizer, set(module.parameters()), self.precision.name_of)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Brings the optimizer's state to its parameters, and returns it.

        Raises:
            ValueError: it holds parameters of a sharded model and others, or some that were added to one after its
                setup, whose gradients would not be reduced.
        """
        self._members.check(optimizer, self._unsynced.roots, self.precision.name_of)
        self._restores.callback(override(optimizer, "zero_grad", dropping(self._unsynced.drop)))
        return super().setup_optimizer(optimizer)

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Shards the converted module over the processes; all start from rank zero's parameters and buffers.

        Raises:
            ValueError: a selection that matches nothing, parameters tied across groups, parameters that train in
                several dtypes in one module, that no function initialises, or that FSDP cannot shard; nothing was
                sharded.
            RuntimeError: there is no process group.
        """
        if not dist.is_initialized():
            raise RuntimeError(
                "FSDPStrategy has no process group: run it in Fabric(strategy=...), under torchrun or fabric.launch()"
            )
        blocks = repeated_blocks(module) if self._wrap is None else select("wrap", self._wrap, module)
        again = to_recompute(self._recompute, module, blocks)
        groups = make_groups(module, blocks, self.precision)
        check_can_initialise(module, self._init_fn, self._empty.modules)
        if any(isinstance(param, DTensor) for param in module.parameters()):
            raise ValueError(f"this {type(module).__name__} is sharded already: give fabric.setup the model as it was")
        mesh = self._get_mesh()
        check_reshard(self._reshard_after_forward, mesh)
        check_can_shard(module, mesh)
        for restore in recompute(again.items(), self.precision):
            self._restores.callback(restore)
        offload = CPUOffloadPolicy() if self._cpu_offload else OffloadPolicy()
        for group in groups:
            send(group.params, self.device)
            fully_shard(
                group.modules if group.beside else group.modules[0],
                mesh=mesh,
                reshard_after_forward=self._reshard_after_forward,
                mp_policy=group.casts.policy(),
                offload_policy=offload,
            )
        send(module.buffers(), self.device)
        if is_on_meta(module):
            how = (module, self._init_fn, self.device)
            expect(module, leave_empty(*how, offload=self._cpu_offload, empty=self._empty.modules))
            materialise(*how, offload=self._cpu_offload)
        refuse_copies(module)
        notes = notes_of(module, groups, mesh, len(again))
        report = self.precision.report
        self.precision.report = replace(report, notes=(*report.notes, *self._notes, *notes))
        self._restores.callback(override(module, "zero_grad", dropping(drop)))
        self._unsynced.add(module)
        return module

    def make_outer_forward(self, module: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
        """Returns what gathers the root's parameters around a marked method; forward has FSDP's hooks for that."""
        if not isinstance(module, FSDPModule):
            return None
        is_wide = self.precision.policy.grads is not self.precision.policy.params
        keep = self._keep_wide

        def make(function: Callable[..., Any]) -> Callable[..., Any]:
            name = function.__name__
            function = first_order(function)
            if name != "forward":
                function = _gathering(module, name, function)

            def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                check_not_lost(self)
                check_filled(self)
                result = function(self, *args, **kwargs)
                if is_wide:  # FSDP2 has looked at the dtypes by now
                    keep(uncompiled(self))
                return result

            return method

        return make

    def _keep_wide(self, module: nn.Module) -> None:
        if module not in self._wide:
            self._wide.add(module)
            for undo in keep_wide(module, self.precision.policy):
                self._restores.callback(undo)

    # ---------------------------------------------------------------- step

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Runs backward from the loss; after an exception in it, the gradients of this step are lost.

        Raises:
            ValueError: `create_graph=True`, for second-order gradients.
            RuntimeError: second-order gradients that `torch.func.grad` began.
        """
        check_first_order(kwargs)
        try:
            super().backward(tensor, module, *args, **kwargs)
        except BaseException as error:
            for sharded in self._unsynced.roots:
                begin_anew(sharded)
            if (clearer := explained(error)) is not None:
                raise clearer from error
            raise

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """Steps the optimizer as the precision says.

        Raises:
            RuntimeError: its parameters have unsynced gradients: no backward has reduced them.
            ValueError: it has got parameters since its setup whose gradients are not reduced.
        """
        self._members.check(optimizer, self._unsynced.roots, self.precision.name_of)
        check = functools.partial(self._unsynced.check_reduced, optimizer, self.precision.name_of)
        if closure is None:
            check()
        else:
            closure = followed_by(closure, check)
        return super().optimizer_step(optimizer, closure, **kwargs)

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        """Context in which backward reduces no gradients: FSDP2 accumulates them unsharded, in the reduce dtype."""
        if not enabled or not isinstance(module, FSDPModule):
            yield
            return
        self._unsynced.expect(self.precision.scaler)
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)

    def teardown(self) -> None:
        """Gives checkpointed blocks their own forward back, and ends the process group if it was made here."""
        self._restores.close()
        if self._made_group and dist.is_initialized():
            dist.destroy_process_group()
        self._made_group = False
        self._device_mesh = None
        if hasattr(self, "precision"):
            self.precision.policy = vars(self.precision).pop(_OWN_POLICY, self.precision.policy)

    # ---------------------------------------------------------------- helpers

    def _get_mesh(self) -> DeviceMesh:
        if self._device_mesh is None:
            with outside_of_modes():
                self._device_mesh = make_mesh(self._mesh, self.device, self.group.world_size)
        return self._device_mesh


def _gathering(module: nn.Module, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the method with FSDP's hooks of `module` around it."""
    hidden = f"_fsdp_{name}"
    setattr(module, hidden, MethodType(function, module))
    register_fsdp_forward_method(module, hidden)
    bound = vars(module).pop(hidden)
    return lambda _, *args, **kwargs: bound(*args, **kwargs)
