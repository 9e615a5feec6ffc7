"""Fabric: the thin host that ties one precision to one strategy around the user's own loop.

fabric = Fabric(precision="bf16-mixed")
model, optimizer = fabric.setup(model, optimizer)
for batch in fabric.setup_dataloaders(loader):
    optimizer.zero_grad()
    loss = criterion(model(batch["input"]), batch["target"])
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, overload
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from precision_core import lightning_names
from precision_core.data import rng
from precision_core.override import is_overridden, override, undone_on_error
from precision_core.policy.casting import move
from precision_core.policy.policy import Policy
from precision_core.precision.base import Precision
from precision_core.precision.loss_check import check_loss
from precision_core.precision.loss_watch import LossWatch
from precision_core.precision.model import unmarked
from precision_core.precision.model.recast import following_casts, forget_cast
from precision_core.precision.model.remap import ParamMap, named_params, replaced_params, repoint
from precision_core.precision.model.report import module_bytes
from precision_core.precision.model.upcast import check_upcast, upcast
from precision_core.scaling.gradients import params_of
from precision_core.strategies import Strategy, membership
from precision_core.strategies.collectives import operation_name
from precision_core.strategies.processes import Ranks
from precision_core.support.composition import check_composition
from precision_core.support.resolve import resolve_precision, resolve_strategy

if TYPE_CHECKING:
    from precision_core.checkpoint.background import PendingSave
    from precision_core.checkpoint.presence import Presence
    from precision_core.checkpoint.weights.layers import Loaded
    from precision_core.data.loader import DeviceLoader

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)
Opt = TypeVar("Opt", bound=Optimizer)


class Fabric:
    """Ties a precision to a strategy.

    Args:
        accelerator: "auto", "cpu", "gpu", "cuda", "mps", "xpu" or "tpu".
        strategy: the name of a strategy ("ddp"), a `Strategy`, or "auto": one device in this process, "ddp" where there
            are several processes, "xla" where accelerator is "tpu".
        devices: how many processes on this machine, one a device: a number, a list of device indices, or "auto",
            which is all GPUs, or one process on a CPU, or what torchrun started.
        precision: a mode ("bf16-mixed", or one that an installed package brings), an alias (16), a policy or its
            spelling, or a plugin.
        num_nodes: how many machines; start them with torchrun.
        upcast: under a mixed mode, cast trainable parameters that are not float32 to float32 at setup, instead of
            refusing them: for checkpoints that arrive in bfloat16 or float16.

    Raises:
        ValueError: an argument that is unknown, a device that is missing, or a plugin and strategy that do not fit.
    """

    def __init__(
        self,
        accelerator: str = "auto",
        strategy: str | Strategy = "auto",
        devices: int | str | Sequence[int] = "auto",
        precision: str | int | Policy | Precision = "32-true",
        *,
        num_nodes: int = 1,
        upcast: bool = False,
    ) -> None:
        self._strategy, self._layout = resolve_strategy(strategy, accelerator, devices, num_nodes)
        self._precision = resolve_precision(precision, self._strategy)
        check_composition(self._precision, self._strategy)
        self._upcast = upcast
        if upcast:
            check_upcast(self._precision.policy, self._precision.mode)
        self._arguments = (accelerator, strategy, devices, precision), {"num_nodes": num_nodes, "upcast": upcast}
        is_started = self._layout.ranks is not None or not self._strategy.multiprocess
        self._joined = is_started and not self._strategy.missing_variables()
        if self._joined:
            self._strategy.join(self._layout.ranks or Ranks())
            self._strategy.connect(self._precision)
        self._presence = self._strategy.presence = self._make_presence() if self._joined else None
        self._optimizers: WeakSet[Optimizer] = WeakSet()
        self._models: WeakSet[nn.Module] = WeakSet()
        if self._joined:
            self._strategy.optimizers = self._optimizers
        self._losses = LossWatch(self._precision.mode)
        self._restores: list[Callable[[], None]] = []
        self._replaced: ParamMap = WeakIdKeyDictionary()  # what setup replaced, for optimizers that are set up later

    def _make_presence(self) -> Presence:
        from precision_core.checkpoint.presence import Presence  # `import precision_core` takes none of its checkpoints

        return Presence(self._strategy)

    def __repr__(self) -> str:
        ranks = f"rank {self.global_rank} of {self.world_size}" if self._joined else f"{self.world_size}, not launched"
        where = f"device={str(self.device)!r}, {ranks if self.world_size > 1 else 'one process'}"
        strategy = self._strategy.name or type(self._strategy).__name__
        return f"<Fabric precision={self._precision.mode!r} strategy={strategy!r} {where}>"

    # ---------------------------------------------------------------- what there is

    if not TYPE_CHECKING:  # which reports an unknown name itself

        def __getattr__(self, name: str) -> Any:
            """Says what Lightning Fabric's names are called here; only reached by names that are not there."""
            raise AttributeError(lightning_names.missing(name), name=name, obj=self)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._strategy.device

    @property
    def precision_plugin(self) -> Precision:
        """The precision plugin in use."""
        return self._precision

    @property
    def strategy(self) -> Strategy:
        """The strategy in use."""
        return self._strategy

    @property
    def global_rank(self) -> int:
        """This process's number among all processes of the run."""
        return self._strategy.global_rank if self._joined else 0

    @property
    def local_rank(self) -> int:
        """This process's number on its machine."""
        return self._strategy.local_rank if self._joined else 0

    @property
    def world_size(self) -> int:
        """How many processes the run has."""
        return self._strategy.world_size if self._joined else self._layout.world_size

    @property
    def node_rank(self) -> int:
        """This machine's number among the machines of the run."""
        ranks = self._layout.ranks or Ranks()
        return ranks.rank // ranks.local_world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.global_rank == 0

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last optimizer step was skipped: `if not fabric.last_step_skipped: scheduler.step()`."""
        return self._precision.last_step_skipped

    # ---------------------------------------------------------------- set-up

    def launch(self, function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Starts the processes of the run, where they are not started yet; call it right after `Fabric(...)`.

        Without a function the script is started again from its top, once in each process, and what follows runs in all
        of them. With one, `function(fabric, *args, **kwargs)` runs in new processes, and what it returns on rank zero
        is returned. On one device, and under torchrun, it only calls the function.

        A strategy that needs other environment variables than this process has (XLA's several CPU devices) starts one
        process with them.

        Raises:
            RuntimeError: there is no script to start again; a process failed, with the traceback of the first one.
        """
        if self._joined:
            return None if function is None else function(self, *args, **kwargs)
        if self._layout.num_nodes > 1:
            raise RuntimeError(
                "fabric.launch() starts the processes of one machine; on several, start the script on each with "
                f"torchrun --nnodes={self._layout.num_nodes} --nproc-per-node={len(self._layout.indices)} ..."
            )
        if function is None:
            return self._strategy.start_processes(None, (), self._layout)
        arguments = (self._arguments, function, args, kwargs)
        return self._strategy.start_processes(_run_launched, arguments, self._layout)

    def _check_launched(self, all_call: str = "") -> None:
        """Raises where processes are not started yet; where all ranks must be in `all_call`, returns when they are."""
        if self._presence is not None:
            if all_call:
                self._presence.all_call(all_call)
            return
        missing = " ".join(f"{name}={value}" for name, value in self._strategy.missing_variables().items())
        needs = (
            f"this run needs a process that was started with {missing}"
            if missing
            else f"this run has {self._layout.world_size} processes, and they are not started yet"
        )
        raise RuntimeError(f"{needs}: call fabric.launch() right after Fabric(...)")

    @overload
    def setup(self, model: Model) -> Model: ...
    @overload
    def setup(self, model: Model, optimizer: Opt, /) -> tuple[Model, Opt]: ...
    @overload
    def setup(self, model: Model, *optimizers: Optimizer) -> tuple[Any, ...]: ...
    def setup(self, model: nn.Module, *optimizers: Optimizer) -> Any:
        """Converts the model, moves it to the device, and lets forward, backward and step run in the precision.

        Returns the very objects that it was given: `model` alone, or `(model, *optimizers)`. Where the precision
        replaced parameters, the optimizers hold the new ones; a model that is itself one layer that was replaced comes
        back as the new layer.

        Raises:
            ValueError: something that was set up before, or that the precision refuses; nothing was set up.
        """
        self._check_optimizers(optimizers)
        if isinstance(model, nn.Module):
            membership.check_together(_uncompiled(model), optimizers, *self._known_params())
        self._strategy.check_optimizers(*optimizers)
        self._precision.register_optimizers(*optimizers)  # before the model is converted: it may refuse one
        with self._undone_on_error():
            model = self._setup_module(model, optimizers)
            self._setup_optimizers(*optimizers)
            self._strategy.setup_together(_uncompiled(model), optimizers)
            forget_cast(_uncompiled(model))  # that was the engine
        return (model, *optimizers) if optimizers else model

    def setup_module(self, model: Model) -> Model:
        """Sets up a model without optimizers, for evaluation for example; see `setup`."""
        with self._undone_on_error():
            result: Any = self._setup_module(model)
            self._strategy.setup_together(_uncompiled(result), ())
        return result

    def _setup_module(self, model: nn.Module, optimizers: tuple[Optimizer, ...] = ()) -> nn.Module:
        if not isinstance(model, nn.Module):
            raise ValueError(f"fabric.setup expected a torch.nn.Module first, got a {type(model).__name__}")
        self._check_launched()
        target = _uncompiled(model)
        if is_overridden(target, "forward"):
            raise ValueError(f"this {type(target).__name__} is set up already; a copy of it needs no setup either")
        self._strategy.check_together(target, optimizers)
        before = named_params(target)
        bytes_before = module_bytes(target) if self._upcast else 0
        items = upcast(target, self._precision.policy, self._precision.storage) if self._upcast else []
        converted = self._precision.convert_module(target)
        if items:
            report = self._precision.report
            both = (*items, *report.converted)
            self._precision.report = replace(report, converted=both, bytes_before=bytes_before)
        converted = self._strategy.setup_module(converted)
        if converted is not target is not model:  # torch.compile holds on to the one that it was given
            raise ValueError(
                f"{self._precision.mode} replaced the whole compiled {type(target).__name__}: set it up first, then "
                "compile what fabric.setup returns"
            )
        self._replaced.update(replaced_params(before, converted))
        self._models.add(converted)
        outer = model if converted is target else converted
        self._override_method(converted, outer, "forward")
        policy = self._precision.policy
        forget_cast(converted)
        self._restores.append(override(converted, "_apply", following_casts(policy.params)))
        for name in unmarked.methods(converted) if policy.mixed else ():
            if name not in vars(converted):  # not what the user has put there
                watch = unmarked.watching(name, self.device.type, self._precision.mode)
                self._restores.append(override(converted, name, watch))
        return outer

    @overload
    def setup_optimizers(self, optimizer: Opt, /) -> Opt: ...
    @overload
    def setup_optimizers(self, *optimizers: Optimizer) -> tuple[Optimizer, ...]: ...
    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Sets up optimizers apart from their model; returns the one, or a tuple of them."""
        self._check_optimizers(optimizers)
        membership.warn_apart(optimizers, list(self._models), *self._known_params())
        self._strategy.check_optimizers(*optimizers)
        self._precision.register_optimizers(*optimizers)
        with self._undone_on_error():
            self._setup_optimizers(*optimizers)
            self._strategy.setup_together(None, optimizers)
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def _setup_optimizers(self, *optimizers: Optimizer) -> None:
        for optimizer in optimizers:
            repoint(optimizer, self._replaced)
            self._strategy.setup_optimizer(optimizer)
            self._optimizers.add(optimizer)
            self._restores.append(override(optimizer, "step", self._make_step))

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Context that gives objects their own methods back when it raises, those of precision and strategy too."""
        before = len(self._restores)
        try:
            with undone_on_error():
                yield
        except BaseException:
            while len(self._restores) > before:
                self._restores.pop()()
            raise

    def _check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        for index, optimizer in enumerate(optimizers):
            if not isinstance(optimizer, Optimizer):
                raise ValueError(f"fabric.setup expected a torch optimizer, got a {type(optimizer).__name__}")
            if is_overridden(optimizer, "step") or any(optimizer is other for other in optimizers[:index]):
                raise ValueError(f"this {type(optimizer).__name__} is set up already")

    def _known_params(self) -> tuple[WeakIdKeyDictionary, set[int]]:
        """Returns the parameters of models that were set up, as they were and are, and ids of what optimizers hold."""
        known = WeakIdKeyDictionary()
        known.update(self._replaced)
        for model in self._models:
            known.update({param: param for param in model.parameters()})
        return known, {id(param) for optimizer in self._optimizers for param in params_of(optimizer)}

    def _make_step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        run, losses = self._strategy.optimizer_step, self._losses
        losses.sees_steps = True

        def step(self: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            result = run(self, closure, **kwargs)
            losses.stepped()
            return result

        def plain(optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
            return function(optimizer, **kwargs) if closure is None else function(optimizer, closure, **kwargs)

        def let_go() -> None:
            nonlocal run
            run = plain

        self._restores.append(let_go)  # a scheduler that has wrapped this step goes on calling it after teardown
        return step

    def mark_forward_method(self, model: nn.Module, name: str) -> None:
        """Lets the model's method `name` run in the precision too, as forward does.

        Raises:
            ValueError: the model is not set up, has no such method, or the method is marked already.
        """
        target = _uncompiled(model)
        if not is_overridden(target, "forward"):
            raise ValueError("fabric.mark_forward_method: set the model up first with fabric.setup(model)")
        method = getattr(target, name, None) if isinstance(name, str) else None
        if not callable(method) or isinstance(method, nn.Module):
            raise ValueError(f"fabric.mark_forward_method: {type(target).__name__} has no method {name!r}")
        if is_overridden(target, name) and not unmarked.is_watched(target, name):
            raise ValueError(f"fabric.mark_forward_method: {name!r} is marked already")
        self._override_method(target, model, name)

    def _override_method(self, module: nn.Module, outer: nn.Module, name: str) -> None:
        self._restores.append(override(module, name, self._strategy.make_forward))
        make = self._strategy.make_outer_forward(module)
        if make is not None:  # outside of torch.compile: an engine is not to be traced
            self._restores.append(override(outer, name, make))

    @overload
    def setup_dataloaders(
        self, loader: Iterable[Any], /, *, move_to_device: bool = True, use_distributed_sampler: bool = True
    ) -> DeviceLoader: ...
    @overload
    def setup_dataloaders(
        self, *loaders: Iterable[Any], move_to_device: bool = True, use_distributed_sampler: bool = True
    ) -> tuple[Any, ...]: ...
    def setup_dataloaders(
        self, *loaders: Iterable[Any], move_to_device: bool = True, use_distributed_sampler: bool = True
    ) -> Any:
        """Returns the loaders with their batches moved to the device, dtypes untouched; one, or a tuple of them.

        With several processes each gets its share of the data by a `DistributedSampler`, reshuffled every epoch where
        the loader shuffles: `batch_size` is that of one process. `use_distributed_sampler=False` leaves that to you.

        Raises:
            ValueError: a loader whose data cannot be shared out like this (its own sampler, a subclass); says how.
        """
        self._check_launched()
        if use_distributed_sampler and self.world_size > 1:
            from precision_core.data.sharing import share_out  # so does torch.utils.data

            loaders = tuple(share_out(loader, self.global_rank, self.world_size) for loader in loaders)
        moved = tuple(self._strategy.make_loader(loader) if move_to_device else loader for loader in loaders)
        return moved[0] if len(moved) == 1 else moved

    def to_device(self, data: T) -> T:
        """Returns `data` on this process's device, dtypes untouched: tensors in any nesting, or a module, in place."""
        return data.to(self.device) if isinstance(data, nn.Module) else move(data, self.device)

    @contextmanager
    def init_module(self) -> Iterator[None]:
        """Context in which modules are built where the strategy wants them, with parameters in the precision's dtype.

        That is the device; strategies that shard build modules without values, which `setup` gives them.
        """
        with self._strategy.module_init_context(self._precision):
            yield

    @contextmanager
    def init_tensor(self) -> Iterator[None]:
        """Context in which tensors are created on the device, in the dtype that inputs are cast to."""
        with self.device, self._precision.tensor_init_context():
            yield

    # ---------------------------------------------------------------- the loop

    def autocast(self) -> AbstractContextManager[Any]:
        """Context in which code outside the model's forward runs in the precision."""
        return self._precision.forward_context()

    def backward(self, tensor: Tensor, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Runs backward from the loss; use it in place of `loss.backward()`. Arguments go to `Tensor.backward`.

        Raises:
            ValueError: no tensor, or one without a graph, or of several values and without their gradient.
        """
        check_loss(tensor, has_gradient=(bool(args) and args[0] is not None) or kwargs.get("gradient") is not None)
        if not self._precision.policy.scale:  # else the scaler skips such steps, and counts them
            self._losses.backward(tensor)
        self._strategy.backward(tensor, None if model is None else _uncompiled(model), *args, **kwargs)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Makes the gradients of `optimizer` true, once per step, before your own code reads or changes `p.grad`.

        `optimizer.step()` then steps them as they are. Where the loss is not scaled they are true already.

        Raises:
            RuntimeError: they come from no `fabric.backward`, or were changed while they carried the scale; under an
                engine that keeps gradients to itself, what to do instead.
        """
        self._strategy.unscale_gradients(optimizer)

    def clip_gradients(
        self,
        model: nn.Module | None,
        optimizer: Optimizer | None = None,
        *,
        max_norm: float | None = None,
        clip_val: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor | None:
        """Clips true gradients, of `optimizer` or of the whole `model`; see `Precision.clip_gradients`."""
        return self._strategy.clip_gradients(
            None if model is None else _uncompiled(model),
            optimizer,
            max_norm=max_norm,
            clip_val=clip_val,
            norm_type=norm_type,
            error_if_nonfinite=error_if_nonfinite,
        )

    def no_backward_sync(self, model: nn.Module, enabled: bool = True) -> AbstractContextManager[Any]:
        """Context for all but the last backward of an accumulation: gradients are not reduced over ranks in it."""
        return self._strategy.no_backward_sync(_uncompiled(model), enabled)

    def all_gather(self, data: T) -> T:
        """Returns `data`, any nesting, with each tensor as (world_size, *shape): those of all ranks, of one shape."""
        self._check_launched()
        return self._strategy.all_gather(data)

    def all_reduce(self, data: T, op: Any = "mean", *, reduce_op: Any = None) -> T:
        """Returns `data`, any nesting, with each tensor's "mean", "sum", "min" or "max" over all ranks.

        `reduce_op` is another name for `op`, as Lightning Fabric has it; "avg" and torch's `ReduceOp` are understood.

        Raises:
            ValueError: another operation, or two.
        """
        self._check_launched()
        name = operation_name(op)
        if reduce_op is not None:
            if name not in ("mean", operation_name(reduce_op, "reduce_op")):
                raise ValueError(f"all_reduce(op={op!r}, reduce_op={reduce_op!r}): pass one of them")
            name = operation_name(reduce_op, "reduce_op")
        return self._strategy.all_reduce(data, name)

    def broadcast(self, data: T, src: int = 0) -> T:
        """Returns rank `src`'s `data` on every rank: any object that pickles, its tensors on the rank's device."""
        self._check_launched()
        return self._strategy.broadcast(data, src)

    def barrier(self, name: str | None = None) -> None:
        """Waits until every process is here; `name` is for the reader."""
        self._check_launched()
        self._strategy.barrier()

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Context that rank 0 runs before the others, to download data say; with `local`, rank 0 of each machine.

        The others wait for it at a barrier, as long as the strategy's `timeout` allows, and go on where it raises.
        """
        self._check_launched()
        is_first = (self.local_rank if local else self.global_rank) == 0
        if not is_first:
            self._strategy.barrier()
        try:
            yield
        finally:
            if is_first:
                self._strategy.barrier()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on the first rank only."""
        if self.is_global_zero:
            print(*args, **kwargs)

    @staticmethod
    def seed_everything(seed: int) -> int:
        """Seeds Python's, numpy's and torch's generators, all devices included; returns `seed`."""
        return rng.seed_everything(seed)

    # ---------------------------------------------------------------- checkpoints

    def save(
        self,
        path: str | PathLike[str],
        state: dict[str, Any],
        filter: dict[str, Any] | None = None,
        *,
        wait: bool = True,
    ) -> PendingSave:
        """Writes a checkpoint, all or nothing; with several processes call it on all of them, rank 0 writes.

        `state` holds objects with `state_dict` (loaders from `setup_dataloaders` too) and plain values, dicts may nest.
        The precision's state and the random generators' are added. `filter` maps a key of `state` to
        `callable(name, value) -> bool`, which chooses the entries of that key's state dict to save:
        `filter={"model": lambda name, value: "lora" in name}`. Where `state` nests, so does `filter`.

        With `wait=False` it copies the state to host memory and returns; a thread writes. What is returned has
        `wait()`, which raises if that failed; else the next save does.

        Raises:
            ValueError: a value that `load` would refuse, a filter without its key; names the key. An address
                ("s3://bucket/last.ckpt") for `path`; `~` and "file:///..." are paths.
            OSError: the file cannot be written; names the path. In both cases an old file at `path` stays.
            CheckpointError: another rank failed, or is gone, or has gone on without calling this.
        """
        from precision_core.checkpoint.background import PendingSave
        from precision_core.checkpoint.live.state import check_is_dict
        from precision_core.checkpoint.paths import local_path
        from precision_core.checkpoint.save import save

        place = local_path(path, "fabric.save")
        check_is_dict("fabric.save", state)
        self._check_launched("fabric.save")
        if self._strategy.save_checkpoint(place, state, filter):
            return PendingSave(place)
        return save(place, state, filter, self._strategy, wait)

    def load(
        self,
        path: str | PathLike[str],
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        filter: dict[str, Any] | None = None,
        trust: bool = False,
    ) -> dict[str, Any]:
        """Reads a checkpoint, a file or a folder, verified and not executed; into `state` all or nothing.

        With `state`, its objects, its plain values, the precision and the random generators are brought to what was
        saved, and what `state` has no key for is returned. If anything raises, all of them are as before; an interrupt
        that comes while the last values are being copied waits until they are. `filter` as for `save`, of modules only:
        entries that it says no to stay as they are. Without `state`, all is returned and nothing live is touched.
        `strict=False` allows missing keys and rounding, and warns of each object that did not fit whole.
        Under a strategy that shards, tensors that `state` has no key for are not read: they are on the meta device.
        `trust=True` loads objects that a safe load refuses, and runs whatever code the checkpoint names.

        Raises:
            CheckpointError: damaged, foreign, newer, or does not fit; an object that did not load, by its name.
            FileNotFoundError: there is no such file.
        """
        from precision_core.checkpoint.live.state import check_is_dict
        from precision_core.checkpoint.load import load
        from precision_core.checkpoint.paths import local_path
        from precision_core.checkpoint.storage.engine import folder_of

        place = folder_of(local_path(path, "fabric.load"))
        check_is_dict("fabric.load", {} if state is None else state)
        self._check_launched("" if state is None else "fabric.load")  # without one each rank may read for itself
        loaded = self._strategy.load_checkpoint(place, state, strict, filter, trust)
        if loaded is not None:
            return loaded
        return load(place, state, strict, filter, trust, self._strategy)

    def save_module(self, path: str | PathLike[str], module: nn.Module, *, max_shard_size: int | str = "5GB") -> None:
        """Writes a module's parameters and buffers as safetensors, as Hugging Face libraries read and write them.

        Above `max_shard_size` it is several files and an index beside them. All or nothing; with several processes call
        it on all of them, rank zero writes. Needs `pip install safetensors`.

        Raises:
            OSError: the file cannot be written; what was there stays.
            CheckpointError: rank zero could not write it.
        """
        from precision_core.checkpoint.agreement import agreed
        from precision_core.checkpoint.paths import local_path
        from precision_core.checkpoint.weights.files import save_module

        place, target = local_path(path, "fabric.save_module"), _uncompiled(module)
        self._check_launched("fabric.save_module")
        with agreed(self._strategy, "save"), self._strategy.whole(target):
            save_module(place, target, max_shard_size=max_shard_size, keep=self.is_global_zero)

    def load_module(self, path: str | PathLike[str], module: nn.Module, strict: bool = True) -> Loaded:
        """Reads safetensors, memory-mapped, into a module: a file, an index file, or a folder with either.

        Layers with a way of their own to load, such as quantised ones, get their tensors one layer at a time. Returns
        the names that were `missing` and `unexpected`; under `strict` there are none. Where the module is sharded call
        it on all ranks: each takes its shards, once the file fits on all of them.

        Raises:
            CheckpointError: damaged, or does not fit, here or on another rank; nothing was changed.
            FileNotFoundError: there is no such file.
        """
        from precision_core.checkpoint.agreement import agreed
        from precision_core.checkpoint.paths import local_path
        from precision_core.checkpoint.tensors import is_sharded
        from precision_core.checkpoint.weights.files import load_module

        place, target = local_path(path, "fabric.load_module"), _uncompiled(module)
        self._check_launched("fabric.load_module" if any(map(is_sharded, target.parameters())) else "")
        if any(param.is_meta for param in target.parameters()):
            self._precision.before_load(target)
        with self._strategy.whole(target, writes=True):
            if not any(map(is_sharded, target.parameters())):
                return load_module(place, target, strict)
            with agreed(self._strategy, "load") as ranks:
                return load_module(place, target, strict, agree=ranks.reach)

    def teardown(self) -> None:
        """Gives the objects that were set up their own methods back; dtypes stay."""
        while self._restores:
            self._restores.pop()()
        if self._presence is not None:
            from precision_core.checkpoint.background import forget

            self._presence.close()
            forget(self._strategy)  # waits for a save that is under way
        self._precision.teardown()
        self._strategy.teardown()


def _run_launched(
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What `launch` runs in each new process, where torchrun's variables are set now."""
    fabric = Fabric(*arguments[0], **arguments[1])
    result = function(fabric, *args, **kwargs)
    fabric.teardown()  # not after an error: other ranks would fail of the closed connection, and perhaps say so first
    return result


def _uncompiled(model: nn.Module) -> nn.Module:
    """Returns the module inside `torch.compile(module)`, where an override is traced; any other as it is."""
    if isinstance(model, torch.jit.ScriptModule):  # whose modules have no `get`
        return model
    inner = model._modules.get("_orig_mod")  # no getattr: a module takes long to say that it has no such attribute
    return model if inner is None else inner
