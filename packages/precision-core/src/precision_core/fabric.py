"""Fabric: ties one precision to one strategy, around a training loop of your own.

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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core import lightning_names
from precision_core.override import uncompiled
from precision_core.policy.casting import move
from precision_core.policy.policy import Policy
from precision_core.precision.base import Precision
from precision_core.precision.loss_check import check_loss
from precision_core.precision.model.upcast import check_upcast
from precision_core.saving import Saving
from precision_core.strategies import Strategy
from precision_core.strategies.attach import Attached
from precision_core.strategies.membership import check_module, check_optimizer
from precision_core.support.resolve import check_composition, resolve_precision, resolve_strategy

if TYPE_CHECKING:
    from precision_core.data.loader import DeviceLoader
    from precision_core.support.chosen import Chosen

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)
Opt = TypeVar("Opt", bound=Optimizer)


class Fabric(Saving):
    """Trains in a precision under a strategy; `setup` takes model and optimizers, then the loop is your own.

    Args:
        accelerator: "auto", "cpu", "gpu", "cuda", "mps", "xpu" or "tpu".
        strategy: the name of a strategy ("ddp"), a `Strategy`, or "auto": one device in this process, "ddp" where there
            are several processes, "xla" where accelerator is "tpu".
        devices: the processes on this machine, one per device: a number, a list of device indices, or "auto": all GPUs,
            one process on a CPU, or what torchrun started.
        precision: a mode ("bf16-mixed", or one from an installed package), an alias (16), a policy or its spelling, or
            a plugin. "auto" takes what `precision choose` wrote into ./precision.json, "auto:PATH" another file; a
            model or a machine that was not measured is refused.
        num_nodes: how many machines; start them with torchrun.
        upcast: under a mixed mode, cast trainable float16 and bfloat16 parameters to float32 at setup, which refuses
            them otherwise: for checkpoints in half precision.
        tf32: let CUDA devices compute what a mode has in float32 in TF32, which keeps 10 of its 23 bits and is several
            times faster; else TF32 is off in forward and backward, whatever the process has set.

    Raises:
        ValueError: an unknown argument, a missing device, or a plugin that cannot run under the strategy.
        ImportError: the package that brings the mode or the strategy cannot be imported.
        RuntimeError: from methods that need the run's processes, where `launch` has not started them yet.
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
        tf32: bool = False,
    ) -> None:
        chosen, layout = resolve_strategy(strategy, accelerator, devices, num_nodes)
        self._chosen = _read_chosen(precision, layout.device_type)
        self._precision = resolve_precision(precision if self._chosen is None else self._chosen.precision, chosen)
        check_composition(self._precision, chosen)
        if upcast:
            check_upcast(self._precision.policy, self._precision.mode)
        again = functools.partial(
            Fabric, accelerator, strategy, devices, precision, num_nodes=num_nodes, upcast=upcast, tf32=tf32
        )
        super().__init__(chosen, layout, again)
        if self._joined:
            from precision_core.checkpoint.presence import Presence  # a plain `import precision_core` takes none of it

            chosen.connect(self._precision)
            self._presence = Presence(chosen)
        chosen.presence = self._presence
        self._attached = Attached(self._precision, chosen, upcast=upcast, tf32=tf32)  # connecting may change the policy
        if self._joined:
            chosen.optimizers = self._attached.optimizers

    def __repr__(self) -> str:
        ranks = f"rank {self.global_rank} of {self.world_size}" if self._joined else f"{self.world_size}, not launched"
        where = f"device={str(self.device)!r}, {ranks if self.world_size > 1 else 'one process'}"
        strategy = self._strategy.name or type(self._strategy).__name__
        return f"<Fabric precision={self._precision.mode!r} strategy={strategy!r} {where}>"

    # ---------------------------------------------------------------- attributes

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
        """Converts the model's dtypes, moves it to the device, and has forward, backward and step run in the precision.

        Returns the same objects: `model` alone, or `(model, *optimizers)`. Where the precision replaces parameters,
        the optimizers hold the new ones; a model that is itself a layer to be replaced comes back as the new layer.

        Raises:
            ValueError: a model or optimizer that was set up before, that the precision or the strategy refuses, or that
                do not belong together; nothing was set up.
        """
        self._check_can_setup(model)
        self._attached.register(optimizers, model)
        with self._attached.undone_on_error():
            model = self._attached.module(model)
            self._attached.take_optimizers(*optimizers)
            self._strategy.setup_together(uncompiled(model), optimizers)
            self._attached.remember_dtypes(uncompiled(model), optimizers)
        return (model, *optimizers) if optimizers else model

    def setup_module(self, model: Model) -> Model:
        """Sets up a model without optimizers, to evaluate it for example; returns and raises as `setup` does."""
        self._check_can_setup(model)
        with self._attached.undone_on_error():
            result: Any = self._attached.module(model)
            self._strategy.setup_together(uncompiled(result), ())
            self._attached.remember_dtypes(uncompiled(result), ())
        return result

    def _check_can_setup(self, model: Any) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"fabric.setup expected a torch.nn.Module first, got a {type(model).__name__}")
        self._check_launched()
        if self._chosen is not None:
            self._chosen.check_model(uncompiled(model))

    @overload
    def setup_optimizers(self, optimizer: Opt, /) -> Opt: ...
    @overload
    def setup_optimizers(self, *optimizers: Optimizer) -> tuple[Optimizer, ...]: ...
    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Sets up optimizers that are made after their model's setup; returns the one, or a tuple of them.

        Raises:
            ValueError: one that was set up before, or that the precision or the strategy refuses.
        """
        self._attached.register(optimizers)
        with self._attached.undone_on_error():
            self._attached.take_optimizers(*optimizers)
            self._strategy.setup_together(None, optimizers)
            self._attached.remember_dtypes(None, optimizers)
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def mark_forward_method(self, model: nn.Module, name: str) -> None:
        """Has the model's method `name` run in the precision too, as forward does.

        Raises:
            ValueError: the model is not set up, has no such method, or the method is marked already.
        """
        self._attached.mark_forward_method(model, name)

    def setup_schedulers(self, *schedulers: Any) -> Any:
        """Has `scheduler.step()` do nothing after an optimizer step that was skipped; returns the one, or a tuple.

        For schedulers that are stepped after each `optimizer.step()`; leave those out that are stepped once an epoch.
        On a GPU nothing waits for whether the step was skipped, as `fabric.last_step_skipped` does: the rate follows
        when the next `optimizer.step()`, `get_last_lr()` or `state_dict()` needs it.

        Raises:
            ValueError: no scheduler, or one that was set up before, or whose optimizer was not.
        """
        with self._attached.undone_on_error():
            self._attached.take_schedulers(*schedulers)
        return schedulers[0] if len(schedulers) == 1 else schedulers

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
        """Returns loaders whose batches arrive on the device, dtypes unchanged; one, or a tuple of them.

        With several processes each gets its share of the data from a `DistributedSampler`, reshuffled every epoch where
        the loader shuffles; `batch_size` is per process. `use_distributed_sampler=False` leaves sharing to you.

        Raises:
            ValueError: a loader whose data cannot be shared by that sampler (its own sampler, a subclass); says how.
        """
        self._check_launched()
        if use_distributed_sampler and self.world_size > 1:
            from precision_core.data.sharing import share_out  # so does torch.utils.data

            loaders = tuple(share_out(loader, self.global_rank, self.world_size) for loader in loaders)
        moved = tuple(self._strategy.make_loader(loader) if move_to_device else loader for loader in loaders)
        return moved[0] if len(moved) == 1 else moved

    def to_device(self, data: T) -> T:
        """Returns `data` on this process's device, dtypes unchanged: tensors in any nesting, or a module, in place."""
        return data.to(self.device) if isinstance(data, nn.Module) else move(data, self.device)

    @contextmanager
    def init_module(self, empty_init: bool = False) -> Iterator[None]:
        """Context in which modules are built where the strategy wants them, with parameters in the precision's dtype.

        That is the device; strategies that shard build modules without values, which `setup` gives them. With
        `empty_init` they leave that to `load_module` or `load`, called after `setup`: nothing is drawn that a file
        replaces, and a forward before that raises. Other strategies draw all the same.
        """
        left = self._strategy.left_to_a_file() if empty_init else nullcontext()
        with self._strategy.module_init_context(self._precision), left:
            yield

    @contextmanager
    def init_tensor(self) -> Iterator[None]:
        """Context in which tensors are created on the device, in the dtype that inputs are cast to."""
        with self.device, self._precision.tensor_init_context():
            yield

    # ---------------------------------------------------------------- the loop

    def autocast(self) -> AbstractContextManager[Any]:
        """Context in which code outside the model's forward runs in the precision: autocast under mixed modes."""
        context, tf32 = self._precision.forward_context(), self._attached.tf32_context
        return context if tf32 is nullcontext or torch.compiler.is_compiling() else tf32(context)

    def backward(self, tensor: Tensor, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Runs backward from the loss, scaled where the mode scales; further arguments go to `Tensor.backward`.

        Use it in place of `loss.backward()`. `model` is for strategies whose engine runs backward.

        Raises:
            ValueError: not a tensor, a tensor without a graph, or one of several values without `gradient`.
        """
        check_loss(tensor, has_gradient=(bool(args) and args[0] is not None) or kwargs.get("gradient") is not None)
        if not self._precision.policy.scale:  # else the scaler skips such steps, and counts them
            self._attached.losses.backward(tensor)
        target, tf32 = None if model is None else uncompiled(model), self._attached.tf32_context
        if tf32 is nullcontext:
            self._strategy.backward(tensor, target, *args, **kwargs)
            return
        with tf32():
            self._strategy.backward(tensor, target, *args, **kwargs)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divides the gradients of `optimizer` by the loss scale, in place, at most once per step.

        Call it before your own code reads or changes `p.grad`; `clip_gradients` and `optimizer.step()` do not divide
        again. Does nothing where the loss is not scaled.

        Raises:
            ValueError: not an optimizer.
            RuntimeError: the gradients come from no `fabric.backward`, or were changed while they carried the scale; or
                the strategy's engine holds them (DeepSpeed), or they stay scaled until the step (16-master); the error
                says what to do instead.
        """
        check_optimizer("fabric.unscale_gradients", optimizer)
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
        """Unscales and clips gradients in place: those of `optimizer`, or of all of `model` where that is None.

        Pass `max_norm`, for the norm of all of them together, or `clip_val`, for each element. Returns the unscaled
        norm before clipping for `max_norm` (a tensor of no dimensions, over all shards), None for `clip_val`. Where the
        loss is scaled, inf and NaN lead to a skipped step, not to an error, unless `error_if_nonfinite`. `16-master`
        leaves float16 gradients as they are, and clips float32 copies in the step.

        Raises:
            ValueError: not exactly one of `max_norm` and `clip_val`, neither `model` nor `optimizer`, or other objects.
            RuntimeError: `error_if_nonfinite` and the norm is inf or NaN; or as `unscale_gradients`.
        """
        if model is not None:
            instead = (
                "write fabric.clip_gradients(model, optimizer, max_norm=1.0), for all of a model without optimizer"
            )
            check_module("fabric.clip_gradients", model, instead)
        if optimizer is not None:
            check_optimizer("fabric.clip_gradients", optimizer)
        return self._strategy.clip_gradients(
            None if model is None else uncompiled(model),
            optimizer,
            max_norm=max_norm,
            clip_val=clip_val,
            norm_type=norm_type,
            error_if_nonfinite=error_if_nonfinite,
        )

    def no_backward_sync(self, model: nn.Module, enabled: bool = True) -> AbstractContextManager[Any]:
        """Context for all but the last forward and backward of an accumulation: it reduces no gradients over ranks.

        The forward has to be inside it, too: DDP decides there whether the backward reduces. `model` is one that was
        set up; with `enabled=False` the context changes nothing.
        """
        return _nested(
            self._precision.accumulation_context(enabled),
            self._strategy.no_backward_sync(uncompiled(model), enabled),
        )

    def teardown(self) -> None:
        """Ends the run: restores the methods of what was set up (dtypes stay), waits for a save, leaves the group."""
        self._attached.detach()
        if self._presence is not None:
            from precision_core.checkpoint.background import forget

            self._presence.close()
            forget(self._strategy)  # waits for a save that is under way
        self._precision.teardown()
        super().teardown()


def _read_chosen(precision: object, device_type: str) -> Chosen | None:
    """Returns what the file says that "auto" names, checked against this machine; None for any other precision."""
    if not isinstance(precision, str) or not precision.startswith("auto"):
        return None
    from precision_core.support.chosen import is_auto, read_chosen  # who names a mode needs none of it

    if not is_auto(precision):
        return None
    chosen = read_chosen(precision)
    chosen.check_machine(device_type)
    return chosen


@contextmanager
def _nested(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield
