"""Loss scaling where half gradients stay as they are until the step, which unscales float32 copies of them.

Divided by the scale, a float16 gradient would lose the bits that scaling is to keep. So half gradients carry the scale
until their optimizer has stepped. What clipping does to them is kept beside them, and goes into the step as well; they
are then brought to what was stepped, rounded. Gradients in other dtypes, of exceptions, are handled as `LossScaler`
does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.policy.messages import listed
from precision_core.scaling.clipping import Clip, by_mesh, check_norm, norm_over
from precision_core.scaling.gradients import all_finite, gradients_of, multiply, params_of
from precision_core.scaling.loss_scaler import _ADVICE, LossScaler
from precision_core.scaling.records import Gradients, Record, Ways, rescale
from precision_core.scaling.scaler import NameOf, Unscale

_WAYS = Ways(
    "{} leaves them so until the step: clip with fabric.clip_gradients(model, optimizer, max_norm=...), read them as "
    'p.grad.float() / precision.scale, and for any other change of gradients use precision="16-mixed"',
    "call its step",
    'use precision="16-mixed", whose gradients fabric.unscale_gradients(optimizer) divides',
)


class Clipped(NamedTuple):
    """What clipping makes of a half gradient: the unscaled one times `factor`, no element beyond `bound`."""

    factor: float | Tensor = 1.0
    bound: float | Tensor | None = None


_AS_IT_IS = Clipped()


class MasterScaler(LossScaler):
    """Scales the loss; `unscaling` gives a step the gradients of `dtype` in float32. Arguments as of `LossScaler`.

    Args:
        dtype: of the parameters that have float32 master weights, and of the gradients that stay scaled.
        mode: what the user asked for, in messages.
    """

    def __init__(self, *args: Any, dtype: torch.dtype, mode: str, **kwargs: Any) -> None:
        ways = _WAYS._replace(before_a_change=_WAYS.before_a_change.format(mode))
        super().__init__(*args, ways=ways, **kwargs)
        self._dtype = dtype
        self._mode = mode
        self._advice = _ADVICE.format(mode, "bf16-master")
        self._clipped: weakref.WeakKeyDictionary[Optimizer, dict[int, Clipped]] = weakref.WeakKeyDictionary()
        self._inverse: weakref.WeakKeyDictionary[Optimizer, float | Tensor] = weakref.WeakKeyDictionary()
        """1 / scale of the optimizers that are in a step: their half gradients still carry it."""

    def _held(self, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Returns those whose gradients stay scaled."""
        return [
            param
            for param in params
            if param.dtype is self._dtype and param.grad is not None and param.grad.dtype is self._dtype
        ]

    def _others(self, optimizer: Optimizer) -> list[Tensor]:
        held = {id(param) for param in self._held(params_of(optimizer))}
        gradients = [p.grad for p in params_of(optimizer) if p.grad is not None and id(p) not in held]
        return [_values(gradient) for gradient in gradients]

    # ---------------------------------------------------------------- unscaling

    def unscale(self, optimizer: Optimizer) -> None:
        """Raises `RuntimeError`: half gradients are not divided where they are."""
        raise RuntimeError(
            f"fabric.unscale_gradients: {self._mode} leaves float16 gradients scaled until the step, which divides "
            "them in float32; in float16 the small ones would be lost. Clip with fabric.clip_gradients(model, "
            "optimizer, max_norm=...), which returns the unscaled norm, read them as p.grad.float() / precision.scale, "
            'or use precision="16-mixed"'
        )

    def unscaling(self, optimizer: Optimizer) -> Unscale:
        """Returns what divides float32 copies of half gradients by the scale, and clips them."""
        inverse, clipped = self._inverse.get(optimizer, 1.0), self._clipped.get(optimizer, {})
        known: dict[int, Clipped] = {}

        def unscale(param: nn.Parameter, gradient: Tensor) -> Tensor:
            each = known.get(id(param))
            if each is None:
                factor, bound = clipped.get(id(param), _AS_IT_IS)
                each = known[id(param)] = Clipped(factor * inverse, bound)
            _apply(each, _values(gradient))
            return gradient

        return unscale

    def _unscale(self, optimizer: Optimizer, record: Record, gradients: list[Tensor]) -> None:
        """Looks for inf and NaN in all gradients, and divides those in other dtypes."""
        self._check_complex(optimizer)
        scale = self._scale.value()
        inverse = 1.0 / scale if isinstance(scale, float) else scale.reciprocal()
        held = [_values(param.grad) for param in self._held(params_of(optimizer)) if param.grad is not None]
        flags: dict[torch.device, Tensor] = {}
        _check(held, 1.0, flags)
        _check(self._others(optimizer), inverse, flags)
        flag: Tensor | None = None  # a closure may leave no gradients
        for each in flags.values():
            flag = each if flag is None else torch.maximum(flag, each.to(flag.device))
        self._records.now_unscaled(optimizer, record, flag)
        self._inverse[optimizer] = inverse

    def _check_complex(self, optimizer: Optimizer) -> None:
        wrong = [param for param in params_of(optimizer) if param.grad is not None and param.is_complex()]
        if wrong:
            raise ValueError(
                f"{self._mode} scales the loss, and torch unscales no complex gradients, those of "
                f'{listed(map(self._name_of, wrong), 5)}: use precision="bf16-master", which does not scale, hold them '
                "as real parameters (torch.view_as_real), or freeze them with requires_grad_(False) "
                "[complex-parameters]"
            )

    def _scale_again(self, optimizer: Optimizer, record: Record, scale: float | Tensor) -> None:
        clipped, inverse = self._clipped.pop(optimizer, {}), self._inverse.pop(optimizer, None)
        if record.gradients is Gradients.SCALED:
            if clipped:
                self._settle(optimizer, clipped, 1.0, scale)
        elif inverse is None:
            super()._scale_again(optimizer, record, scale)
        else:  # in the closure of an optimizer that steps by several
            rescale(self._others(optimizer), 1.0, scale)
            self._settle(optimizer, clipped, inverse * scale, scale)

    def _settle(
        self, optimizer: Optimizer, clipped: dict[int, Clipped], factor: float | Tensor, scale: float | Tensor
    ) -> None:
        """Multiplies half gradients by `factor`, and makes of them what clipping did; `scale`: what they carry then."""
        for param in self._held(params_of(optimizer)):
            each = clipped.get(id(param), _AS_IT_IS)
            bound = None if each.bound is None else each.bound * scale
            assert param.grad is not None
            _apply(Clipped(each.factor * factor, bound), _values(param.grad))

    # ---------------------------------------------------------------- clipping

    def clip(
        self, optimizer: Optimizer | None, params: list[nn.Parameter], clip: Clip, name_of: NameOf
    ) -> Tensor | None:
        """Clips the gradients of `params`, half ones in the step; returns their unscaled norm for `max_norm`.

        Gradients with inf or NaN lead to a skipped step, not to an error, unless `clip.error_if_nonfinite`.
        """
        optimizers = [optimizer] if optimizer is not None else self._holders(params, name_of)
        holders = {id(param): each for each in optimizers for param in params_of(each)}
        for each in optimizers:
            self._records.carry_scale(each, self._record(each), gradients_of(each))
            self._clipped.setdefault(each, {})
        for param in params:
            if param.grad is not None and param.grad.is_sparse:
                param.grad = param.grad.coalesce()  # else one row may be there twice
        scale = self._scale.value()
        held = {id(param) for param in self._held(params)}

        def clipped(param: nn.Parameter) -> Clipped:
            return self._clipped[holders[id(param)]].get(id(param), _AS_IT_IS)

        def seen(param: nn.Parameter) -> Tensor:
            """Returns the gradient as it was clipped before, and carries the scale."""
            assert param.grad is not None
            factor, bound = clipped(param) if id(param) in held else _AS_IT_IS
            values = _values(param.grad)
            if not isinstance(factor, Tensor) and factor == 1.0 and bound is None:
                return values
            wide = values.float()
            _apply(Clipped(factor, None if bound is None else bound * scale), wide)
            return wide

        norm: Tensor | None = None
        factor: float | Tensor = 1.0
        if clip.max_norm is not None:
            norm = norm_over([[seen(param) for param in kind] for kind in by_mesh(params)], clip.norm_type) / scale
            check_norm(norm, clip)
            factor = (clip.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for param in params:
            if id(param) in held:
                before = clipped(param)
                bound = clip.clip_val if before.bound is None else before.bound * factor
                if clip.clip_val is not None and before.bound is not None:
                    bound = _smaller(before.bound, clip.clip_val)
                self._clipped[holders[id(param)]][id(param)] = Clipped(before.factor * factor, bound)
            elif param.grad is not None:
                bound = None if clip.clip_val is None else clip.clip_val * scale
                _apply(Clipped(factor, bound), _values(param.grad))
        for each in optimizers:
            record = self._record(each)
            if record.snapshot is not None:
                record.look(each)  # other gradients than half ones were changed here
        return norm

    # ---------------------------------------------------------------- the step

    def _step_or_skip(self, optimizer: Optimizer, record: Record, kwargs: dict[str, Any]) -> Any:
        try:
            return super()._step_or_skip(optimizer, record, kwargs)
        finally:
            self._end_step(optimizer)

    def _step_with(
        self, closure: Callable[[], Any], optimizer: Optimizer, record: Record, name_of: NameOf, kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super()._step_with(closure, optimizer, record, name_of, kwargs)
        finally:
            self._end_step(optimizer)

    def _end_step(self, optimizer: Optimizer) -> None:
        """Brings half gradients to what was stepped, for whoever reads them now."""
        clipped, inverse = self._clipped.pop(optimizer, {}), self._inverse.pop(optimizer, None)
        if inverse is not None:
            self._settle(optimizer, clipped, inverse, 1.0)

    def check_skips(self, name_of: NameOf) -> None:
        """Raises `FloatingPointError` after `max_skips` skipped steps in a row.

        It names the weights that float16 does not hold, or else the parameters with inf or NaN in their gradients.
        """
        if self.counter.skipped_in_a_row >= self._max_skips:
            params = [param for optimizer, _ in self._records.live() for param in params_of(optimizer)]
            beyond = [name_of(param) for param in params if param.dtype is self._dtype and not all_finite([param])]
            if beyond:
                raise FloatingPointError(
                    f"{self.counter.skipped_in_a_row} optimizer steps in a row were skipped: weights of "
                    f"{listed(beyond, 5)} are beyond {torch.finfo(self._dtype).max:,.0f}, the largest number of "
                    f'float16, or NaN. Let them stay float32 (precision="{self._mode}; NAME: 32-true"), or use '
                    'precision="bf16-master" [no-finite-gradients]'
                )
        super().check_skips(name_of)


def _values(gradient: Tensor) -> Tensor:
    """Returns the numbers of a gradient that this rank has; changes of them are seen in its version."""
    gradient = gradient.detach()
    return gradient._values() if gradient.is_sparse else gradient


@torch.no_grad()
def _apply(clipped: Clipped, gradient: Tensor) -> None:
    """Multiplies a gradient by the factor, and brings finite elements beyond the bound to it, in place."""
    local: Any = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    factor, bound = clipped
    if isinstance(factor, Tensor) or factor != 1.0:
        multiply([local], factor.to(local.device) if isinstance(factor, Tensor) else factor)
    if bound is not None:
        bound = bound.to(local.device, torch.float32) if isinstance(bound, Tensor) else bound
        clamped = local.float().clamp(-bound, bound)  # a bound may be beyond float16
        local.copy_(torch.where(local.isinf(), local, clamped))  # an overflow is still to be found


def _smaller(one: float | Tensor, other: float) -> float | Tensor:
    return one.clamp(max=other) if isinstance(one, Tensor) else min(one, other)


def _check(gradients: list[Tensor], inverse: float | Tensor, flags: dict[torch.device, Tensor]) -> None:
    """Multiplies gradients by `inverse`, in place; sets their device's flag where inf or NaN is found, on any rank."""
    alike: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        key = (type(gradient), gradient.dtype, gradient.device, getattr(gradient, "device_mesh", None))
        alike.setdefault((*key, getattr(gradient, "placements", None)), []).append(gradient)
    for group in alike.values():
        device = group[0].device
        factor = inverse.to(device) if isinstance(inverse, Tensor) else torch.full((), inverse, device=device)
        flag = flags.setdefault(device, torch.zeros((), device=device))
        torch._amp_foreach_non_finite_check_and_unscale_(group, flag, factor)
