"""DeepSpeedStrategy: ZeRO at stages 0 to 3, by DeepSpeed's engine around the user's own model and optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core import Policy, Precision, Strategy
from precision_core.checkpoint import Filter, stateful_objects
from precision_core.override import original
from precision_core.scaling import make_clip
from precision_core.strategies import Layout, Ranks, TorchGroup, join
from precision_core.support import is_core_mode
from precision_deepspeed import vendor
from precision_deepspeed.arguments import check_devices, check_optimizer, check_together, config_of
from precision_deepspeed.binding import bind, unbind
from precision_deepspeed.checkpoints import describe, read_plain
from precision_deepspeed.checkpoints import folder as checkpoint
from precision_deepspeed.config import deepspeed_config, stage_of
from precision_deepspeed.direct import check_in_shards, check_not_transformed, on_gradients_of, once
from precision_deepspeed.engine import Engine
from precision_deepspeed.engines import make_engine
from precision_deepspeed.plugin import DeepSpeedPrecision


class _Format:
    """A folder with the engine's own files, where the state has the engine's model or optimizer in it."""

    def takes(self, strategy: DeepSpeedStrategy, state: dict[str, Any]) -> bool:
        """Whether the engine holds the model or the optimizer.

        Raises:
            ValueError: a model for evaluation that is in shards.
        """
        objects = list(stateful_objects(state))
        for path_to, value in objects:
            if any(value is evaluated.module for evaluated in strategy._evaluated):
                raise ValueError(
                    f"fabric.save: the model at {path_to} was set up for evaluation and is in shards, of which "
                    "DeepSpeed writes no checkpoint; fabric.save_module(path, model) gathers and writes it"
                )
        return strategy._engine is not None and any(strategy._engine.holds(value) for _, value in objects)

    def save(self, strategy: DeepSpeedStrategy, path: Path, state: dict[str, Any], filter: Filter | None) -> None:
        """Writes the folder; see `checkpoint.save`."""
        assert strategy._engine is not None
        checkpoint.save(path, state, filter, strategy, strategy._engine)

    def load(
        self,
        strategy: DeepSpeedStrategy,
        path: Path,
        state: dict[str, Any] | None,
        strict: bool,
        filter: Filter | None,
        trust: bool,
    ) -> dict[str, Any]:
        """Reads the folder; see `checkpoint.load`."""
        return checkpoint.load(path, state, strict, filter, trust, strategy, strategy._engine)

    def read(
        self, folder: Path, content: dict[str, Any], trust: bool
    ) -> tuple[dict[str, Any], dict[tuple[Any, ...], str]]:
        """Returns `content` with the model's float32 values, and how the optimizer's state is converted."""
        return read_plain(folder, content, trust)


class DeepSpeedStrategy(Strategy):
    """One process per device; optimizer state (stage 1), gradients (2) and parameters (3) are sharded over them.

    `fabric.setup(model, optimizer)` gives both to one DeepSpeed engine and returns the same objects; `model(...)`,
    `fabric.backward` and `optimizer.step()` call the engine. It trains one model with one optimizer; models without an
    optimizer may be set up beside it for evaluation.

    Args:
        stage: 0 (gradients are averaged, nothing is sharded), 1, 2 or 3.
        config: DeepSpeed's own config (https://www.deepspeed.ai/docs/config-json/) for what has no argument here.
        offload_optimizer: keep optimizer state and master weights in CPU memory.
        offload_parameters: keep parameters there too, at stage 3.
        backend: of torch.distributed; None is gloo on CPUs, and nccl or xccl beside it on GPUs.
        timeout: how long a process waits for the others in a collective; None is torch's default.

    Raises:
        ValueError: a stage that does not exist, offloading that the stage does not have, a config that contradicts the
            arguments.
    """

    name = "deepspeed"
    multiprocess = True
    checkpoint_format = _Format()

    def __init__(
        self,
        stage: int = 2,
        config: Mapping[str, Any] | None = None,
        *,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        backend: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self.config = config_of(stage, config, offload_optimizer, offload_parameters)
        self.stage = stage_of(self.config)
        self.backend = backend
        self.timeout = timeout
        self.converted = ""
        """What the last `fabric.load` converted: "world_size 2 -> 1, stage 2 -> 3", or ""."""
        self._engine: Engine | None = None
        self._evaluated: list[Any] = []  # engines without an optimizer
        self._in_engine = False
        self._made_group = False
        self._until_teardown = ExitStack()

    def lay_out(self, accelerator: str, devices: int | str | Sequence[int], num_nodes: int) -> Layout:
        """Returns core's layout.

        Raises:
            ValueError: also devices that are not those of the local ranks, where DeepSpeed would put the model.
        """
        layout = super().lay_out(accelerator, devices, num_nodes)
        check_devices(layout)
        return layout

    def join(self, ranks: Ranks) -> None:
        """Joins the other processes of the run, and has DeepSpeed use the device."""
        vendor.use_accelerator(self.device.type)
        self._made_group = join(ranks, self.device, self.backend, self.timeout)
        self.group = TorchGroup(ranks, self.device)
        if self.stage == 3:  # which reads LOCAL_RANK in the first steps, also in a process that no launcher started
            self._until_teardown.enter_context(vendor.local_rank_variable(ranks.local_rank))

    # ---------------------------------------------------------------- precision

    def make_precision(self, policy: Policy) -> Precision:
        """Returns the plugin that is native to the engine."""
        return DeepSpeedPrecision(policy)

    def refuses(self, precision: Precision) -> str | None:
        """Returns why not: DeepSpeed's engine casts itself, or the config contradicts the mode."""
        if not isinstance(precision, DeepSpeedPrecision):
            if not is_core_mode(precision.mode):
                return (
                    "DeepSpeed's engine casts itself, and runs the modes of precision-core only: use "
                    'strategy="fsdp" or "ddp"'
                )
            return (
                "DeepSpeed's engine casts itself: pass the mode as a string, or "
                f'DeepSpeedPrecision("{precision.mode}")'
            )
        try:
            deepspeed_config(precision.policy, self.config)
        except ValueError as error:
            return str(error)
        return None

    # ---------------------------------------------------------------- set-up

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Returns the module as it is: the engine moves it."""
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Returns the optimizer as it is: the engine takes it.

        Raises:
            ValueError: it has state already, which the engine would discard, or DeepSpeed would replace it.
        """
        check_optimizer(optimizer, self.stage)
        return optimizer

    def setup_together(self, module: nn.Module | None, optimizers: tuple[Optimizer, ...]) -> None:
        """Gives model and optimizer to an engine; a model alone is for evaluation, and is sharded at stage 3 only.

        Raises:
            ValueError: an optimizer without its model, several optimizers, a second model to train, LBFGS; parameters
                that the engine does not support (the error names them).
        """
        config = deepspeed_config(self.precision.policy, self.config)
        if module is None or optimizers:
            module, optimizer = check_together(module, optimizers, self.stage, self._engine is not None)
            names = describe(module, optimizer)
            with self._inside():
                engine = vendor.initialize(self.group.local_rank, model=module, optimizer=optimizer, config=config)
            precision = self.precision
            assert isinstance(precision, DeepSpeedPrecision)
            scaled_here = precision.policy.scale and precision.policy.mixed
            self._engine = make_engine(engine, module, optimizer, self.stage, scaled_here)
            self._engine.names = names
            bind(optimizer, self._engine)
            precision.scaler.attach(engine)
        elif self.stage == 3:
            self._evaluated.append(vendor.initialize(self.group.local_rank, model=module, config=config))
        else:
            module.to(self.device)

    @contextmanager
    def module_init_context(self, precision: Precision) -> Iterator[None]:
        """Context in which modules are built in shards, at stage 3 and where their parameters are float32.

        Under `deepspeed.zero.Init` every tensor that is created gets the parameters' dtype, buffers too, which does no
        harm in float32. Half parameters are built unsharded, and sharded by `fabric.setup`.
        """
        with super().module_init_context(precision):
            if self.stage < 3 or precision.policy.params is not torch.float32:
                yield
                return
            with vendor.zero_init(self.group.local_rank, deepspeed_config(precision.policy, self.config)):
                yield

    def make_outer_forward(self, module: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Returns a decorator that runs a method of `module` inside its engine."""
        strategy = self

        def make(function: Callable[..., Any]) -> Callable[..., Any]:
            def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                engine = strategy._engine
                if engine is not None and engine.is_model(self):
                    return engine.forward(lambda: function(self, *args, **kwargs))
                shards = next((each for each in strategy._evaluated if each.module is self), None)
                if shards is not None:
                    check_not_transformed()
                output = function(self, *args, **kwargs)
                if shards is not None and torch.is_grad_enabled():
                    on_gradients_of(output, once(functools.partial(check_in_shards, shards.optimizer)))
                return output

            return forward

        return make

    # ---------------------------------------------------------------- step

    def _training(self, call: str) -> Engine:
        if self._engine is None:
            raise RuntimeError(f"{call}: no model was set up with an optimizer; call fabric.setup(model, optimizer)")
        return self._engine

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Runs the engine's backward; gradients accumulate until the step.

        Raises:
            ValueError: arguments of `Tensor.backward` other than `retain_graph`, such as `create_graph=True`, which
                the engine does not support; a loss that is not a scalar.
        """
        retain_graph = kwargs.pop("retain_graph", False)
        if kwargs.pop("create_graph", False):
            raise ValueError(
                "fabric.backward(loss, create_graph=True): DeepSpeed's engine does not support it. For "
                "second-order gradients (gradient penalties) take the inner ones with torch.autograd.grad(loss, x, "
                "create_graph=True), at stage 0, 1 or 2, and call fabric.backward with a loss computed from them"
            )
        if args or kwargs or tensor.numel() != 1:
            raise ValueError(
                "fabric.backward under DeepSpeed takes a scalar loss and retain_graph: its engine supports no other "
                "arguments"
            )
        engine = self._training("fabric.backward")
        engine.backward(tensor, self.precision.scaler.factor, bool(retain_graph))

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Unscales the gradients and ends their accumulation, at stage 0.

        Raises:
            ValueError: not the engine's optimizer.
            RuntimeError: there are no gradients, or the engine has them in shards and unscales them in its step.
        """
        engine = self._training("fabric.unscale_gradients")
        if optimizer is not engine.optimizer:
            raise ValueError("fabric.unscale_gradients: pass the optimizer that was given to fabric.setup")
        if not engine.has_gradients:
            raise RuntimeError("fabric.unscale_gradients: there are no gradients; call fabric.backward(loss) first")
        engine.unscale()

    def clip_gradients(self, module: nn.Module | None, optimizer: Optimizer | None, **clip: Any) -> Tensor | None:
        """Clips all gradients of the coming step; arguments and result as in `Precision.clip_gradients`.

        Raises:
            ValueError: a norm other than the 2-norm, under ZeRO; `clip_val` with offloaded gradients.
            RuntimeError: there are no gradients.
        """
        how = make_clip(clip["max_norm"], clip["clip_val"], clip["norm_type"], clip["error_if_nonfinite"])
        engine = self._training("fabric.clip_gradients")
        if not engine.has_gradients:
            raise RuntimeError("fabric.clip_gradients: there are no gradients; call fabric.backward(loss) first")
        if not (module is None or engine.is_model(module)) or optimizer not in (None, engine.optimizer):
            raise ValueError(
                "fabric.clip_gradients under DeepSpeed clips all gradients of the engine together, in its step: pass "
                "the model and the optimizer that were given to fabric.setup"
            )
        return engine.clip(how)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """Has the engine step, which calls the optimizer's own `step`; a closure runs once, before it.

        Raises:
            ValueError: other arguments of the optimizer's `step`, which the engine does not pass on.
            RuntimeError: there are no gradients.
        """
        if self._in_engine:
            return original(optimizer, "step")(**kwargs)
        engine = self._training("optimizer.step")
        if kwargs:
            raise ValueError(
                f"optimizer.step({', '.join(kwargs)}): DeepSpeed's engine passes no arguments to the optimizer"
            )
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if not engine.has_gradients:
            raise RuntimeError(
                "optimizer.step() before any backward: call fabric.backward(loss) first [step-before-backward]"
            )
        with self._inside():
            skipped = engine.step()
        optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers ask for it
        scaler = self.precision.scaler
        scaler.stepped(skipped)  # type: ignore[attr-defined]
        return result

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        """Context that changes nothing: an accumulation ends at the step or at clipping, not in a backward.

        At stages 0 and 1 gradients are reduced then only; at 2 and 3, which keep shards, in every backward.
        """
        return nullcontext()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Context in which a call of `optimizer.step` comes from the engine, not from the user."""
        self._in_engine = True
        try:
            yield
        finally:
            self._in_engine = False

    # ---------------------------------------------------------------- checkpoints

    @contextmanager
    def gathered(self, module: nn.Module, *, writes: bool = False) -> Iterator[None]:
        """Context with parameters gathered on each rank; with `writes`, changes reach shards and master weights."""
        with vendor.gathered(module.parameters(), writes):
            yield
        if writes and self._engine is not None and self._engine.is_model(module):
            self._engine.parameters_changed()

    def teardown(self) -> None:
        """Destroys the engines, undoes what they changed in torch, and the process group if `join` made it."""
        if self._engine is not None:
            unbind(self._engine.optimizer)
            self._engine.destroy()
        for engine in self._evaluated:
            engine.destroy()
        self._engine = None
        self._evaluated.clear()
        self._until_teardown.close()
        if self.stage == 3:
            vendor.give_linear_back()
        if self._made_group and torch.distributed.is_initialized():
            vendor.end_process_group()
        self._made_group = False
