"""Strategy: where the model lives and who runs the step. Always a thin layer on an engine.

The base class calls the precision's hooks; an engine that owns backward, clipping or the step replaces those methods.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.data.loader import DeviceLoader
from precision_core.hardware import ACCELERATORS
from precision_core.policy.casting import holds, map_tensors
from precision_core.policy.dtypes import FLOAT_DTYPES
from precision_core.policy.messages import listed
from precision_core.policy.policy import MODES, Policy
from precision_core.precision.base import Precision
from precision_core.precision.masters import KEYS
from precision_core.precision.model.default_dtype import created_as
from precision_core.precision.model.recast import cast_to, check_trains
from precision_core.precision.plugins import make_plugin
from precision_core.strategies.checkpoint_format import CheckpointFormat
from precision_core.strategies.collectives import Group
from precision_core.strategies.layout import Layout, make_layout
from precision_core.strategies.processes import Ranks

if TYPE_CHECKING:
    from precision_core.checkpoint.presence import Presence

_TRUE = {policy.params: policy for mode, policy in MODES.items() if mode.endswith("-true")}


class Strategy:
    """One process on one device; subclasses say which, and override what their engine does itself."""

    name: str = ""
    """What users ask for it by, and what rows of the support table call it."""
    multiprocess: bool = False
    """Whether it runs one process a device; Fabric then calls `join` before anything else."""
    keeps_wide_gradients: bool = False
    """Whether `Policy.grads` may be wider than params where `multiprocess`."""
    sharded: bool = False
    """Whether checkpoints are folders, to which each rank writes its shards; else rank zero writes one file."""
    checkpoint_format: CheckpointFormat | None = None
    """Of an engine whose objects core cannot save. A class attribute: `read` is called without a strategy object."""
    device: torch.device = torch.device("cpu")
    group: Group = Group()
    """The collectives over the run's processes, once this one has joined them."""
    precision: Precision
    presence: Presence | None = None
    """Tells ranks of each other in calls that all ranks have to make; Fabric sets it."""
    optimizers: Collection[Optimizer] = ()
    """Those that were set up, held weakly; Fabric sets it."""

    # ---------------------------------------------------------------- processes

    def lay_out(self, accelerator: str, devices: int | str | Sequence[int], num_nodes: int) -> Layout:
        """Returns the run's processes and devices, and sets `device` where the user gave none; starts nothing.

        Raises:
            ValueError: devices that are not here, or of another kind than this object was made for.
        """
        layout = make_layout(accelerator, devices, num_nodes)
        if "device" not in vars(self):
            self.device = layout.device
        if accelerator != "auto" and self.device.type not in ACCELERATORS[accelerator]:
            raise ValueError(
                f"Fabric(accelerator={accelerator!r}) got a {type(self).__name__} on {str(self.device)!r}: "
                "leave accelerator out, or make the strategy for that device"
            )
        return layout

    def start_processes(self, function: Callable[..., Any] | None, args: tuple[Any, ...], layout: Layout) -> Any:
        """Starts the processes of the run: the script again in each (no return), or `function(*args)`.

        Returns what the function returned on rank zero; raises as `Fabric.launch` does.
        """
        from precision_core.strategies.launch import (  # torch's launcher takes long to import
            restart_script,
            run_function,
        )

        if function is None:
            restart_script(layout.world_size, layout.missing)
        return run_function(function, args, layout.world_size, layout.missing)

    def join(self, ranks: Ranks) -> None:
        """Joins the other processes of the run and makes `group`, where `multiprocess`; `device` is set before."""

    # ---------------------------------------------------------------- precision

    def make_precision(self, policy: Policy) -> Precision:
        """Returns the plugin for a mode that was given as a string: core's, or one that is native to the engine."""
        return make_plugin(policy, self.device.type)

    def refuses(self, precision: Precision) -> str | None:
        """Returns why `precision` cannot run under this strategy, and what to pass instead; None: it can."""
        return None

    def connect(self, precision: Precision) -> None:
        """Ties the plugin to this strategy, once `refuses` of both have said nothing."""
        precision.connect(self)
        self.precision = precision

    # ---------------------------------------------------------------- set-up

    @contextmanager
    def module_init_context(self, precision: Precision) -> Iterator[None]:
        """Context in which modules are built for this strategy, with parameters in the precision's dtype."""
        with self.device, precision.module_init_context():
            yield

    def left_to_a_file(self) -> AbstractContextManager[None]:
        """Context in which modules are built whose values a file brings after setup: it may leave them out."""
        return nullcontext()

    def check_optimizers(self, module: nn.Module | None, optimizers: Sequence[Optimizer]) -> None:
        """Checks what one call sets up, before anything is converted; `module` None: optimizers apart from a model.

        Raises:
            ValueError: an optimizer that cannot run under this strategy, or not with this model.
        """

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Moves the converted module to where it runs and returns it.

        Raises:
            ValueError: parameters or buffers on the meta device, which have no values to move; names them.
        """
        tensors = itertools.chain(module.named_parameters(), module.named_buffers())
        empty = [name for name, tensor in tensors if tensor.is_meta]
        if empty and self.device.type != "meta":
            raise ValueError(
                f"fabric.setup got a {type(module).__name__} without values, on the meta device: "
                f"{listed(empty, 5)}. Load them first with fabric.load_module(file, model), or give them "
                "values of your own [no-values]"
            )
        return module.to(self.device)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Brings state that the optimizer already has to its parameters' device, in the precision's dtype; returns it.

        What it lists in `non_castable_tensor_keys`, as bitsandbytes' 8-bit ones do, keeps its dtype.
        """
        fixed = getattr(optimizer, "non_castable_tensor_keys", ())
        for group in optimizer.param_groups:
            for param in group["params"]:
                state = optimizer.state.get(param, {})
                for key, value in state.items():
                    if key != "step":
                        dtype = self.precision.state_dtype(param)
                        to = (
                            functools.partial(_to_device, param)
                            if key in fixed or key in KEYS
                            else functools.partial(_to_like, param, dtype)
                        )
                        state[key] = map_tensors(value, to)
                    elif isinstance(value, Tensor) and (group.get("fused") or group.get("capturable")):
                        state[key] = value.to(param.device)  # else on the CPU; float32, as bfloat16 counts to 256
        return optimizer

    def make_loader(self, loader: Iterable[Any]) -> DeviceLoader:
        """Returns a loader that moves each batch to the device."""
        return DeviceLoader(loader, self.device)

    def setup_together(self, module: nn.Module | None, optimizers: tuple[Optimizer, ...]) -> None:
        """Called last, with all that one call set up: for an engine that needs a model and its optimizers at once.

        `module` is None where optimizers were set up apart from their model.
        """

    def make_forward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a module's method, `function(module, ...)`, as it runs under the precision's forward hooks."""
        mine = self.precision
        mixed, params = mine.policy.mixed, mine.policy.params
        plugins = {
            dtype: mine if dtype is params else make_plugin(mode, self.device.type) for dtype, mode in _TRUE.items()
        }

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            cast = cast_to(module)
            if cast is not None:
                check_trains(module, cast, mine.policy, self.optimizers)
            precision = mine if cast is None else plugins[cast]
            args, kwargs = precision.convert_input((args, kwargs))
            # autocast leaves float64 as it is, which layers do not take; and targets and timestamps keep their values.
            aligns = cast is not None or (mixed and holds((args, kwargs), torch.float64))
            with precision.forward_context(), created_as(cast or params, aligns=True) if aligns else nullcontext():
                if torch.compiler.is_compiling():  # a graph that breaks in a `try` is no graph
                    output = function(module, *args, **kwargs)
                else:
                    try:
                        output = function(module, *args, **kwargs)
                    except (RuntimeError, ValueError) as error:
                        from precision_core.precision.model import integer_inputs, recast

                        clearer = integer_inputs.explained(error, module, mine.policy)
                        clearer = clearer or recast.explained(error, module, mine.policy)
                        if clearer is None:
                            raise
                        raise clearer from error
            return precision.convert_output(output)

        return forward

    def make_outer_forward(self, module: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
        """Returns a decorator applied outside `torch.compile`, for engines that must not be traced; or None."""
        return None

    # ---------------------------------------------------------------- step

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Runs backward from the loss; gradients accumulate, scaled where the mode scales."""
        precision = self.precision
        tensor = precision.pre_backward(tensor, module)
        precision.backward(tensor, module, *args, **kwargs)
        precision.post_backward(tensor, module)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divides the gradients of `optimizer` by the loss scale, at most once per step."""
        self.precision.unscale_gradients(optimizer)

    def clip_gradients(self, module: nn.Module | None, optimizer: Optimizer | None, **clip: Any) -> Tensor | None:
        """Unscales and clips gradients; arguments and result as in `Precision.clip_gradients`."""
        return self.precision.clip_gradients(module, optimizer, **clip)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """Steps the optimizer as the precision says."""
        return self.precision.optimizer_step(optimizer, None, closure, **kwargs)

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        """Context in which backward reduces no gradients over ranks."""
        return nullcontext()

    # ---------------------------------------------------------------- checkpoints

    def gathered(self, module: nn.Module, *, writes: bool = False) -> AbstractContextManager[Any]:
        """Context in which each rank has the module's full parameters; with `writes`, what is written in it lasts."""
        return nullcontext()

    def to_cpu(self, content: dict[str, Any]) -> dict[str, Any]:
        """Returns the state dicts to be saved, on the CPU where reading the device's needs the vendor.

        torch reads a file of CUDA tensors without CUDA, and one of XLA tensors only with torch_xla.
        """
        return content

    def teardown(self) -> None:
        """Ends what the engine started."""


def _to_device(param: Tensor, value: Tensor) -> Tensor:
    return value.to(param.device)


def _to_like(param: Tensor, dtype: torch.dtype, value: Tensor) -> Tensor:
    alike = {dtype, value.dtype} <= FLOAT_DTYPES or (param.is_complex() and value.is_complex())
    return value.to(param.device, dtype if alike else value.dtype)
