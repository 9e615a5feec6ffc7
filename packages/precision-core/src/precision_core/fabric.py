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

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core import lightning_names
from precision_core.override import uncompiled
from precision_core.policy.casting import move
from precision_core.policy.policy import Policy
from precision_core.precision.base import Precision
from precision_core.precision.loss_check import check_loss
from precision_core.precision.model.recast import forget_cast
from precision_core.precision.model.upcast import check_upcast
from precision_core.strategies import Strategy
from precision_core.strategies.attach import Attached
from precision_core.strategies.run import Run
from precision_core.support.resolve import check_composition, resolve_precision, resolve_strategy

if TYPE_CHECKING:
    from precision_core.checkpoint.background import PendingSave
    from precision_core.checkpoint.weights.layers import Loaded
    from precision_core.data.loader import DeviceLoader

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)
Opt = TypeVar("Opt", bound=Optimizer)


class Fabric(Run):
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
        chosen, layout = resolve_strategy(strategy, accelerator, devices, num_nodes)
        self._precision = resolve_precision(precision, chosen)
        check_composition(self._precision, chosen)
        if upcast:
            check_upcast(self._precision.policy, self._precision.mode)
        again = functools.partial(Fabric, accelerator, strategy, devices, precision, num_nodes=num_nodes, upcast=upcast)
        super().__init__(chosen, layout, again)
        if self._joined:
            from precision_core.checkpoint.presence import Presence  # a plain `import precision_core` takes none of it

            chosen.connect(self._precision)
            self._presence = Presence(chosen)
        chosen.presence = self._presence
        self._attached = Attached(self._precision, chosen, upcast=upcast)  # connecting may have changed the policy
        if self._joined:
            chosen.optimizers = self._attached.optimizers

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
    def precision_plugin(self) -> Precision:
        """The precision plugin in use."""
        return self._precision

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last optimizer step was skipped: `if not fabric.last_step_skipped: scheduler.step()`."""
        return self._precision.last_step_skipped

    # ---------------------------------------------------------------- set-up

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
        self._check_can_setup(model)
        self._attached.register(optimizers, model)
        with self._attached.undone_on_error():
            model = self._attached.module(model)
            self._attached.take_optimizers(*optimizers)
            self._strategy.setup_together(uncompiled(model), optimizers)
            forget_cast(uncompiled(model))  # that was the engine
        return (model, *optimizers) if optimizers else model

    def setup_module(self, model: Model) -> Model:
        """Sets up a model without optimizers, for evaluation for example; see `setup`."""
        self._check_can_setup(model)
        with self._attached.undone_on_error():
            result: Any = self._attached.module(model)
            self._strategy.setup_together(uncompiled(result), ())
        return result

    def _check_can_setup(self, model: Any) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"fabric.setup expected a torch.nn.Module first, got a {type(model).__name__}")
        self._check_launched()

    @overload
    def setup_optimizers(self, optimizer: Opt, /) -> Opt: ...
    @overload
    def setup_optimizers(self, *optimizers: Optimizer) -> tuple[Optimizer, ...]: ...
    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Sets up optimizers apart from their model; returns the one, or a tuple of them."""
        self._attached.register(optimizers)
        with self._attached.undone_on_error():
            self._attached.take_optimizers(*optimizers)
            self._strategy.setup_together(None, optimizers)
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def mark_forward_method(self, model: nn.Module, name: str) -> None:
        """Lets the model's method `name` run in the precision too, as forward does.

        Raises:
            ValueError: the model is not set up, has no such method, or the method is marked already.
        """
        self._attached.mark_forward_method(model, name)

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
            self._attached.losses.backward(tensor)
        self._strategy.backward(tensor, None if model is None else uncompiled(model), *args, **kwargs)

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
            None if model is None else uncompiled(model),
            optimizer,
            max_norm=max_norm,
            clip_val=clip_val,
            norm_type=norm_type,
            error_if_nonfinite=error_if_nonfinite,
        )

    def no_backward_sync(self, model: nn.Module, enabled: bool = True) -> AbstractContextManager[Any]:
        """Context for all but the last backward of an accumulation: gradients are not reduced over ranks in it."""
        return self._strategy.no_backward_sync(uncompiled(model), enabled)

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
        engines = self._strategy.checkpoint_format
        if engines is not None and engines.takes(self._strategy, state):
            engines.save(self._strategy, place, state, filter)
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
        saved, and what `state` has no key for is returned. If anything raises, all of them are as before; only a signal
        (Ctrl-C) while the last values are copied leaves parts of both. `filter` as for `save`, of modules only:
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
        from precision_core.checkpoint.storage.engine import folder_of, is_engines

        place = folder_of(local_path(path, "fabric.load"))
        check_is_dict("fabric.load", {} if state is None else state)
        self._check_launched("" if state is None else "fabric.load")  # without one each rank may read for itself
        engines = self._strategy.checkpoint_format
        if engines is not None and is_engines(place):
            return engines.load(self._strategy, place, state, strict, filter, trust)
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

        place, target = local_path(path, "fabric.save_module"), uncompiled(module)
        self._check_launched("fabric.save_module")
        with agreed(self._strategy, "save"), self._strategy.gathered(target):
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
        from precision_core.checkpoint.shards import is_sharded
        from precision_core.checkpoint.weights.files import load_module

        place, target = local_path(path, "fabric.load_module"), uncompiled(module)
        self._check_launched("fabric.load_module" if any(map(is_sharded, target.parameters())) else "")
        if any(param.is_meta for param in target.parameters()):
            self._precision.before_load(target)
        with self._strategy.gathered(target, writes=True):
            if not any(map(is_sharded, target.parameters())):
                return load_module(place, target, strict)
            with agreed(self._strategy, "load") as ranks:
                return load_module(place, target, strict, agree=ranks.reach)

    def teardown(self) -> None:
        """Gives the objects that were set up their own methods back; dtypes stay."""
        self._attached.detach()
        if self._presence is not None:
            from precision_core.checkpoint.background import forget

            self._presence.close()
            forget(self._strategy)  # waits for a save that is under way
        self._precision.teardown()
        super().teardown()
