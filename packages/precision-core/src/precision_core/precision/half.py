"""Half precision: parameters, inputs and activations in float16 or bfloat16, without float32 copies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from precision_core.override import is_overridden, override
from precision_core.policy.dtypes import FLOATS, HALF_DTYPES, dtype_name, parse_dtype
from precision_core.policy.messages import listed
from precision_core.policy.patterns import check_all_used, check_pattern, covers
from precision_core.policy.policy import Policy
from precision_core.policy.stored import stores_as_torch
from precision_core.precision.base import Precision
from precision_core.precision.hyperparameters import check_hyperparameters
from precision_core.precision.masters import Masters
from precision_core.precision.model.cast_module import cast_buffers, cast_parameters, packed_parameters
from precision_core.precision.model.default_dtype import created_as
from precision_core.precision.model.parametrized import check_parametrized
from precision_core.precision.model.regions import EffectivePolicies, Restore, apply_exceptions, casting_inputs
from precision_core.precision.model.report import Item, module_bytes
from precision_core.precision.model.wide import Wide
from precision_core.precision.range import check_complex, check_range
from precision_core.precision.torch_scaler import check_scaler
from precision_core.precision.update.gradients import widen
from precision_core.scaling.fused import check_fused
from precision_core.scaling.scaler import Scaler

if TYPE_CHECKING:
    from precision_core.precision.swallowed import Swallowed
    from precision_core.precision.update.updates import Updates
    from precision_core.strategies.base import Strategy

EVERY = 100
"""Steps from one sample of swallowed updates to the next (swallowed.py)."""

_NO_CONTEXT = nullcontext()

_HALF_SPACING = {torch.bfloat16: "1/512 to 1/256", torch.float16: "1/4096 to 1/2048"}


class HalfPrecision(Precision):
    """`16-true` or `bf16-true`: the model is cast, inputs and tensors created in forward get the dtype.

    `bf16-master` and `16-master` compute as those do, and step exact float32 values, of which the parameters are the
    nearest half ones (precision/update/). `16-master` scales the loss, and leaves its gradients scaled until the step.

    Args:
        precision: `"16-true"`, `"bf16-true"`, `"16-master"`, `"bf16-master"`, or a policy whose params and compute are
            the same half dtype; exceptions are applied.
        buffers: None casts floating buffers as the policy says, with a warning that names those which lose by it, and
            keeps those in float32 that `precision_core.precision.RULES` lists. `"float32"` (any float
            dtype) casts all of them to that; name patterns (`{"mean"}`) keep those that match in float32 as well. Batch
            norms that keep float32 statistics keep their weight and bias in float32 too.
        scaler: for a policy that scales the loss, as `MixedPrecision` takes it; and so `min_scale` and `max_skips`.

    Raises:
        ValueError: any other mode, 16 and "bf16" included, which mean mixed precision; a scaler that does not match it.
    """

    _runs = HALF_DTYPES
    _applies_exceptions = True
    _keeps_params = True  # False where an engine stores all parameters in one dtype

    def __init__(
        self,
        precision: str | int | Policy = "16-true",
        *,
        buffers: str | torch.dtype | Iterable[str] | None = None,
        scaler: GradScaler | Mapping[str, float] | None = None,
        min_scale: float = 2.0**-14,
        max_skips: int = 50,
    ) -> None:
        super().__init__(policy=precision)
        self._given_scaler = check_scaler(scaler, self.policy, None, type(self).__name__)
        self._min_scale = min_scale
        self._max_skips = max_skips
        self._float32_buffers: tuple[str, ...] = ()
        self._keeps_buffers = True  # those of the table; False: the caller has said what becomes of all
        if isinstance(buffers, torch.dtype) or (isinstance(buffers, str) and buffers in FLOATS):
            self.policy = replace(self.policy, buffers=parse_dtype(buffers))
            self._keeps_buffers = False
        elif isinstance(buffers, Iterable):
            patterns = [buffers] if isinstance(buffers, str) else buffers
            self._float32_buffers = tuple(check_pattern(pattern) for pattern in patterns)
        elif buffers is not None:
            raise ValueError(f"HalfPrecision(buffers={buffers!r}): expected a float dtype, or name patterns of buffers")
        self._device_type: str | None = None

    def refuses(self, strategy: Strategy) -> str | None:
        """Returns why not: a device without the dtype, or an engine that narrows gradients wider than parameters."""
        is_wide = self.policy.grads is not self.policy.params
        if is_wide and strategy.multiprocess and not strategy.keeps_wide_gradients:
            return (
                f"its engine keeps no gradients wider than their parameters (grads={dtype_name(self.policy.grads)}): "
                "leave grads out (reduce=float32 averages in float32), or use bf16-mixed"
            )
        given = self._given_scaler
        if isinstance(given, GradScaler) and torch.device(given._device).type != strategy.device.type:
            return f"its scaler is for {given._device!r}: pass torch.amp.GradScaler({strategy.device.type!r}, ...)"
        return super().refuses(strategy)

    def connect(self, strategy: Strategy) -> None:
        """Takes the device type, which the scaler and exceptions in mixed precision need."""
        before, self._device_type = self._scalers_device, strategy.device.type
        if self.policy.scale and "scaler" in vars(self) and before != self._device_type:  # nothing was scaled yet
            made = vars(self).pop("scaler")
            vars(self).pop("_torch_scaler", None)
            self.scaler.counter.load_state_dict(made.counter.state_dict())

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Casts parameters and buffers in place, but for those of `wide.RULES`; applies exceptions; returns `module`.

        Warns (once, `UserWarning`) of buffers whose values change by the cast, and of running statistics always: an
        average that is updated by less than the spacing of its dtype stands still.
        """
        check_complex(module, self.policy)
        policies = EffectivePolicies(module, self.policy)
        wide = Wide(module, self.policy, params=self._keeps_params, buffers=self._keeps_buffers)
        names = [name for name, _ in module.named_buffers(remove_duplicate=False)]
        check_all_used(self._float32_buffers, names, "buffer", covers)
        for name, child in module.named_modules():
            check_parametrized(name, child, policies.by_name[name], self.policy)
        before = module_bytes(module)

        def buffer_dtype(name: str, buffer: Tensor) -> torch.dtype:
            if name in wide or any(covers(pattern, name) for pattern in self._float32_buffers):
                return torch.float32
            return policies.of(name).buffers

        wide_norms = {
            name: dtype
            for name, dtype in _norms_with_wide_statistics(module, policies, buffer_dtype).items()
            if self._keeps_params and (f"{name}.running_mean" if name else "running_mean") not in wide
        }

        def param_dtype(name: str, param: nn.Parameter) -> torch.dtype | None:
            if self.storage(param) is None:
                return None
            if name in wide:
                return torch.float32
            return wide_norms.get(name.rpartition(".")[0], policies.of(name).params)

        updates = self._updates
        if updates is not None and self.policy.master is not None:
            check_range(module, param_dtype, self.policy)
        items = cast_parameters(module, param_dtype, None if updates is None else updates.converter(module))
        if updates is not None:
            updates.converted(module)
        widen(module.parameters(), self.policy)
        packed = packed_parameters(module, param_dtype)
        buffers, changed = cast_buffers(module, buffer_dtype)
        statistics = [
            name
            for name, buffer in module.named_buffers(remove_duplicate=False)
            if name.endswith(("running_mean", "running_var")) and buffer.dtype in self._runs
        ]
        restores = apply_exceptions(module, policies, self._device_type)
        aligns = bool(packed or wide.why or wide_norms or self._float32_buffers or restores)
        if aligns:
            restores += _cast_for_unseen_products(module, policies)
        for restore in restores:
            self._restores.callback(restore)
        self._aligns = self._aligns or aligns
        self._warn_of_buffers([name for name in names if name in {*changed, *statistics}])
        if wide.cast:
            warnings.warn(
                f"{type(self).__name__} stores all parameters in {dtype_name(self.policy.params)}, and the model marks "
                f"these to stay float32: {listed(wide.cast)}. A mixed mode "
                "keeps them, and so do other strategies",
                stacklevel=2,
            )
        why = "torch's batch norm wants weight and statistics alike"
        skipped = packed + [Item(name, f"kept in {dtype_name(dtype)}: {why}") for name, dtype in wide_norms.items()]
        skipped += [Item(name, why) for name, why in wide.why.items()]
        return self._converted(module, before, items + buffers, skipped, (self._note_on_updates(),))

    def _note_on_updates(self) -> str:
        dtype = self.policy.params
        if self._updates is not None:
            return self._updates.note
        return (
            f"pure {dtype_name(dtype)} loses updates below half its spacing ({_HALF_SPACING[dtype]} of the parameter): "
            "small learning rates stop moving large parameters; a mixed mode keeps float32 parameters"
        )

    def _warn_of_buffers(self, names: list[str]) -> None:
        if names:
            dtype = dtype_name(self.policy.buffers)
            warnings.warn(
                f"{self.policy.flat} casts buffers to {dtype}, which changes their values or holds running statistics: "
                f"{', '.join(names)}. To keep them: {self.how_to_keep_buffers()}",
                stacklevel=3,
            )

    def how_to_keep_buffers(self) -> str:
        name = type(self).__name__
        return f'{name}("{self.mode}", buffers="float32"), or buffers={{name patterns}} for some of them'

    def register_optimizers(self, *optimizers: Optimizer) -> None:
        """Checks the optimizers, now and where parameter groups are added later.

        Raises:
            ValueError: a fused one that does not step the dtype here; an `eps` or a decay that is 0 or infinite in it,
                here or in a later `add_param_group`.
        """
        if self._updates is not None:  # steps compute in float32
            self._updates.check(optimizers)
            super().register_optimizers(*optimizers)
            return
        check_fused(optimizers, self.policy.params, self._device_type or "cpu")
        for optimizer in optimizers:
            check_hyperparameters(optimizer, range(len(optimizer.param_groups)), self._dtypes_in_steps())
        for optimizer in optimizers:
            if not is_overridden(optimizer, "add_param_group"):
                self._restores.callback(override(optimizer, "add_param_group", self._make_add_param_group))
        super().register_optimizers(*optimizers)

    def _make_add_param_group(self, function: Callable[..., Any]) -> Callable[..., Any]:
        dtypes = self._dtypes_in_steps

        def add_param_group(self: Optimizer, *args: Any, **kwargs: Any) -> None:
            before = len(self.param_groups)
            function(self, *args, **kwargs)
            try:
                check_hyperparameters(self, range(before, len(self.param_groups)), dtypes())
            except ValueError:
                del self.param_groups[before:]
                raise

        return add_param_group

    def _dtypes_in_steps(self) -> Callable[[nn.Parameter], torch.dtype]:
        """Returns what gives a parameter's dtype, or the one that it will be cast to."""
        converted = {id(param) for module in self.models for param in module.parameters()}
        return lambda param: param.dtype if id(param) in converted else self.storage(param) or param.dtype

    # ---------------------------------------------------------------- storage that torch's optimizers do not know of

    @cached_property
    def _updates(self) -> Updates | None:
        """What steps and stores parameters where the policy says more than torch does; None: torch's own steps do."""
        if stores_as_torch(self.policy):
            return None
        from precision_core.precision.update.updates import Updates  # most modes need none

        return Updates(self.policy, self.mode, self.models, self.name_of)

    def placed(self, module: nn.Module, strategy: Strategy) -> None:
        """Brings what was kept of parameters to where they are now; all ranks take rank zero's."""
        if self._updates is not None:
            widen(module.parameters(), self.policy)  # the strategy may have made others
            self._updates.placed(module, strategy.group)

    def adopt(self, optimizer: Optimizer) -> None:
        """Shows what is kept of parameters in the optimizer's state, so that checkpoints have it."""
        if self._updates is not None:
            self._updates.adopt(optimizer)

    def state_dtype(self, param: Tensor) -> torch.dtype:
        """Returns the policy's for what it casts, else the parameter's own."""
        return self.policy.state if param.dtype is self.policy.params else param.dtype

    @property
    def masters(self) -> Masters:
        """The exact values of parameters, where the policy has a master."""
        return super().masters if self._updates is None else self._updates

    def stepping(self, optimizer: Optimizer) -> AbstractContextManager[Any]:
        """Context in which the optimizer steps in float32, where the policy stores more than torch does."""
        if self._updates is not None:
            return self._updates.stepping(optimizer, self.scaler)
        self._until_sample -= 1
        if self._until_sample:
            return _NO_CONTEXT
        self._until_sample = EVERY + 1  # one more, so that optimizers which take turns have theirs
        return self._swallowed.sampling(optimizer)

    _until_sample = EVERY

    @cached_property
    def _swallowed(self) -> Swallowed:
        from precision_core.precision.swallowed import Swallowed

        return Swallowed(self.policy.params, self.mode, self.name_of)

    @property
    def swallowed_updates(self) -> float | None:
        """The share of sampled updates that changed nothing, in the last samples of each parameter; None: no sample."""
        return self._swallowed.share if "_swallowed" in vars(self) else None

    def teardown(self) -> None:
        """Restores methods and hooks of modules and optimizers; dtypes stay."""
        if self._updates is not None:
            self._updates.teardown()
        super().teardown()

    # ---------------------------------------------------------------- scaling

    @cached_property
    def _torch_scaler(self) -> GradScaler:
        if isinstance(self._given_scaler, GradScaler):
            return self._given_scaler
        return GradScaler(self._scalers_device, enabled=self.policy.scale, **self._given_scaler)  # type: ignore[arg-type]

    def setup_scaler(self) -> GradScaler:
        """Returns the torch scaler in use: the one given, else one made now; a disabled one where nothing is scaled."""
        return self._torch_scaler

    @property
    def _scalers_device(self) -> str:
        """The device type of the strategy, else of the models that were converted: those of a loop without Fabric."""
        params = (param for model in self.models for param in model.parameters())
        return self._device_type or next((param.device.type for param in params), "cpu")

    @cached_property
    def scaler(self) -> Scaler:
        """The loss scaler; one that does nothing where the loss is not scaled."""
        if not self.policy.scale:
            return Scaler()
        from precision_core.scaling.master_scaler import MasterScaler  # most modes do not scale

        return MasterScaler(
            self.setup_scaler(),
            min_scale=self._min_scale,
            max_skips=self._max_skips,
            avoid_sync=self._scalers_device != "cpu",
            models=self.models,
            name_of=self.name_of,
            dtype=self.policy.params,
            mode=self.mode,
        )

    # ---------------------------------------------------------------- forward

    def forward_context(self) -> AbstractContextManager[Any]:
        """Context in which created tensors get the dtype, and products take what was kept wide beside what was not."""
        return created_as(self.policy.params, aligns=self._aligns)


def _cast_for_unseen_products(module: nn.Module, policies: EffectivePolicies) -> list[Restore]:
    """Lets layers cast their inputs whose products are not aligned: scripted ones, and torch's recurrent ones.

    Those compare dtypes before their product.
    """
    return [
        override(child, "forward", casting_inputs(policies.by_name[name].params))
        for name, child in module.named_modules()
        if isinstance(child, (nn.RNNBase, torch.jit.ScriptModule)) and not is_overridden(child, "forward")
    ]


def _norms_with_wide_statistics(
    module: nn.Module, policies: EffectivePolicies, buffer_dtype: Any
) -> dict[str, torch.dtype]:
    """Returns name -> dtype of batch norms whose running statistics are kept wider than their weights would be."""
    wide = {}
    for name, child in module.named_modules():
        if isinstance(child, _NormBase) and child.running_mean is not None:
            dtype = buffer_dtype(f"{name}.running_mean" if name else "running_mean", child.running_mean)
            if dtype is not policies.by_name[name].params:
                wide[name] = dtype
    return wide
