"""Loss scaling on top of torch's GradScaler: who unscales what, when the scale moves, and what a step does.

torch's scaler owns the scale, its growth, and the check for inf and NaN. What it leaves to the order of the user's
calls is kept here, one record per optimizer:

    NONE    no loss was scaled since its last step; gradients that lie in p.grad are true
    SCALED  one was; gradients in p.grad carry the scale
    TRUE    they were unscaled since, by `unscale` or `clip`, and not yet stepped

Gradients are unscaled at most once per optimizer and step. The scale is updated as soon as every optimizer of the run
has stepped since the last scaling, else at the next scaling, `state_dict` or read of `factor`. When it changes, the
gradients that still carry the old one are rescaled; when a loss is scaled while true gradients lie there (a backward
after a clip, no zero_grad after a step), these are scaled first, so that the sum is right.

Sources: torch.amp.GradScaler; P. Micikevicius et al., Mixed Precision Training (arXiv 1710.03740).
"""

from __future__ import annotations

import enum
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.nn.utils import get_total_norm
from torch.optim import LBFGS, SGD, Optimizer

from precision_core.clipping import Clip, clip_true_gradients
from precision_core.override import original
from precision_core.scaler import NameOf, Scaler

_SCALER_KEYS = {
    "scale": (float, int),
    "growth_factor": (float, int),
    "backoff_factor": (float, int),
    "growth_interval": (int,),
    "_growth_tracker": (int,),
}


class _Gradients(enum.Enum):
    NONE = enum.auto()
    SCALED = enum.auto()
    TRUE = enum.auto()


class _Record:
    """What is known of one optimizer's gradients."""

    def __init__(self) -> None:
        self.gradients = _Gradients.NONE
        self.stepped = False  # since the last scaling
        self.found_inf: bool | Tensor = False  # in gradients that are TRUE; a tensor where the host must not wait
        self.counted = True  # found_inf has gone into an update of the scale


class LossScaler(Scaler):
    """Scales the loss with `torch_scaler`, an enabled GradScaler.

    Args:
        min_scale: the scale does not fall below this, unless it started there.
        max_skips: so many skipped steps in a row raise `FloatingPointError`.
        lazy: leave the flag "inf or NaN found" on its device where the optimizer can skip there (fused ones), so that
            the host does not wait for it.
    """

    def __init__(self, torch_scaler: GradScaler, *, min_scale: float, max_skips: int, lazy: bool) -> None:
        super().__init__()
        self.torch_scaler = torch_scaler
        self._min_scale = min_scale
        self._max_skips = max_skips
        self._lazy = lazy
        self._records: weakref.WeakKeyDictionary[Optimizer, _Record] = weakref.WeakKeyDictionary()
        self._of_the_run: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._issued: float | Tensor | None = None  # the scale of the last scaling
        self._due = False  # a step's found_inf waits for the update of the scale
        self._last_loss: tuple[weakref.ref[Tensor], Tensor] | None = None

    # ---------------------------------------------------------------- optimizers

    def register(self, optimizers: Iterable[Optimizer]) -> None:
        """Takes note of all optimizers of the run; without it they are known from their first clip or step.

        Raises:
            ValueError: LBFGS, or a parameter that another optimizer holds too.
        """
        for optimizer in optimizers:
            if optimizer not in self._records:
                self._check(optimizer)
                self._records[optimizer] = _Record()
            self._of_the_run.add(optimizer)

    def _record(self, optimizer: Optimizer) -> _Record:
        if optimizer not in self._records:
            self._check(optimizer)
            self._records[optimizer] = record = _Record()
            if self._issued is not None:  # its gradients came from a scaled loss
                record.gradients = _Gradients.SCALED
                self._rescale(optimizer, self._issued, self._value())
        return self._records[optimizer]

    def _check(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS evaluates the loss several times a step and cannot run with a scaled loss: "
                'use another optimizer, or a mode that does not scale such as precision="bf16-mixed"'
            )
        ours = {id(param) for param in _params(optimizer)}
        for other in self._records:
            if any(id(param) in ours for param in _params(other)):
                raise ValueError(
                    f"{type(optimizer).__name__} and {type(other).__name__} hold the same parameter: under a scaled "
                    "loss gradients are unscaled per optimizer, so each parameter may be in one optimizer only"
                )

    # ---------------------------------------------------------------- the scale

    @property
    def factor(self) -> float:
        """The loss scale, after the update that is due."""
        self._update_if_due()
        return self.torch_scaler.get_scale()

    def scale(self, loss: Tensor) -> Tensor:
        """Returns `loss` (any shape) times the scale."""
        for optimizer, record in self._records.items():
            if record.gradients is _Gradients.TRUE:
                self._withdraw(optimizer, record)
        self._update_if_due()
        scaled: Tensor = self.torch_scaler.scale(loss)
        self._issued = self._value()
        for optimizer, record in self._records.items():
            if record.gradients is not _Gradients.SCALED:
                self._rescale(optimizer, 1.0, self._issued)
                record.gradients = _Gradients.SCALED
            record.stepped = False
        self._last_loss = (weakref.ref(scaled), loss)
        return scaled

    def unscaled(self, scaled: Tensor) -> Tensor:
        """Returns the loss that `scale` was given."""
        if self._last_loss is not None and self._last_loss[0]() is scaled:
            loss = self._last_loss[1]
            self._last_loss = None  # it holds the graph
            return loss
        return scaled.detach() / self.torch_scaler.get_scale()

    def _withdraw(self, optimizer: Optimizer, record: _Record) -> None:
        """Takes back the check of gradients that were clipped and then dropped or added to instead of stepped.

        An overflow among dropped ones still lowers the scale; among kept ones it will be found again.
        """
        if not record.counted:
            if record.found_inf and not _gradients(optimizer):
                self._due = True
            else:
                self.torch_scaler._per_optimizer_states.pop(id(optimizer), None)
        record.found_inf, record.counted = False, True

    def _value(self) -> float | Tensor:
        scale = self.torch_scaler._scale
        return scale.clone() if self._lazy and scale is not None else self.torch_scaler.get_scale()

    def _update_if_due(self) -> None:
        if not self._due:
            return
        self._due = False
        old = self._value()
        self.torch_scaler.update()
        if isinstance(old, Tensor):
            scale = self.torch_scaler._scale
            assert scale is not None
            torch.maximum(scale, old.clamp(max=self._min_scale), out=scale)
        elif self.torch_scaler.get_scale() < min(old, self._min_scale):
            self.torch_scaler.update(min(old, self._min_scale))
        self._scale_changed(old)
        for record in self._records.values():
            record.counted = True

    def _scale_changed(self, old: float | Tensor) -> None:
        new = self._value()
        for optimizer, record in self._records.items():
            if record.gradients is _Gradients.SCALED:
                self._rescale(optimizer, old, new)

    def _rescale(self, optimizer: Optimizer, old: float | Tensor, new: float | Tensor) -> None:
        if not isinstance(new, Tensor) and old == new:
            return
        gradients = _gradients(optimizer)
        if gradients:
            with torch.no_grad():
                torch._foreach_mul_(gradients, new / old)

    # ---------------------------------------------------------------- true gradients

    def unscale(self, optimizer: Optimizer) -> None:
        """Divides the gradients of `optimizer` by the scale, at most once until it steps."""
        record = self._record(optimizer)
        self._check_scaled(optimizer, record)
        if record.gradients is _Gradients.SCALED:
            self.torch_scaler.unscale_(optimizer)
            self._now_true(optimizer, record)

    def _now_true(self, optimizer: Optimizer, record: _Record) -> None:
        flags = list(self.torch_scaler._found_inf_per_device(optimizer).values())
        if self._lazy and flags:
            record.found_inf = (
                sum(flag.to(flags[0].device) for flag in flags) + 0
            )  # a new tensor: update() adds in place
        else:
            record.found_inf = any(flag.item() for flag in flags)
        record.gradients, record.counted = _Gradients.TRUE, not flags

    def _check_scaled(self, optimizer: Optimizer, record: _Record) -> None:
        if record.gradients is _Gradients.NONE and _gradients(optimizer):
            raise RuntimeError(
                f"the gradients of {type(optimizer).__name__} come from no scaled loss: nothing was scaled since its "
                "last step. Call fabric.backward(loss) instead of loss.backward(); in a loop without Fabric, "
                "precision.pre_backward(loss, model).backward()"
            )

    def clip(
        self, optimizer: Optimizer | None, params: list[nn.Parameter], clip: Clip, name_of: NameOf
    ) -> Tensor | None:
        """Clips the gradients of `params` and leaves them true; returns their true norm for `max_norm`, else None.

        Gradients with inf or NaN lead to a skipped step, not to an error, unless `clip.error_if_nonfinite`.
        """
        optimizers = [optimizer] if optimizer is not None else self._holders(params, name_of)
        records = {each: self._record(each) for each in optimizers}
        for each, record in records.items():
            self._check_scaled(each, record)
        gradients = [param.grad for param in params if param.grad is not None]
        if clip.max_norm is not None and self._can_clip_at_once(records, gradients):
            norm = self._clip_scaled(records, gradients, clip)
            if norm is not None:
                return norm
        for each in optimizers:
            self.unscale(each)
        return clip_true_gradients(params, clip)

    def _can_clip_at_once(self, records: dict[Optimizer, _Record], gradients: list[Tensor]) -> bool:
        """Whether `gradients` are all that the optimizers hold, all scaled, dense and on one device."""
        return (
            bool(gradients)
            and all(record.gradients is _Gradients.SCALED for record in records.values())
            and len(gradients) == sum(len(_gradients(each)) for each in records)
            and all(type(each) is Tensor and each.layout is torch.strided for each in gradients)
            and len({each.device for each in gradients}) == 1
        )

    @torch.no_grad()
    def _clip_scaled(self, records: dict[Optimizer, _Record], gradients: list[Tensor], clip: Clip) -> Tensor | None:
        """Norm of the scaled gradients, then one multiplication that unscales and clips.

        That saves a pass over the gradients. Returns None, with nothing changed, when the host sees a norm that is not
        finite: it may be the sum of squares that overflowed, so each element has to be checked.
        """
        assert clip.max_norm is not None
        total = get_total_norm(gradients, clip.norm_type)
        scale = self._value()
        if isinstance(scale, Tensor) and not clip.error_if_nonfinite:
            norm = total / scale
            factor: float | Tensor = (clip.max_norm / (norm + 1e-6)).clamp(max=1.0) / scale
            flag = torch.logical_not(torch.isfinite(total)).float()
        else:
            if not math.isfinite(total.item()):
                return None
            norm = total / scale
            factor = min(clip.max_norm / (norm.item() + 1e-6), 1.0) / float(scale)
            flag = torch.zeros((), device=total.device)
        torch._foreach_mul_(gradients, factor)
        for optimizer, record in records.items():
            state = self.torch_scaler._per_optimizer_states[id(optimizer)]
            state["stage"], state["found_inf_per_device"] = OptState.UNSCALED, {flag.device: flag.clone()}
            self._now_true(optimizer, record)
        return norm

    def _holders(self, params: list[nn.Parameter], name_of: NameOf) -> list[Optimizer]:
        wanted = {id(param): param for param in params if param.grad is not None}
        holders = []
        for optimizer in list(self._records):
            held = {id(param) for param in _params(optimizer)} & wanted.keys()
            if held:
                holders.append(optimizer)
                for key in held:
                    del wanted[key]
        if wanted:
            raise ValueError(
                f"clip_gradients(model) found scaled gradients that no known optimizer holds: "
                f"{_first(name_of(param) for param in wanted.values())}. Pass the optimizer, give it to fabric.setup, "
                "or call requires_grad_(False) on parameters that are not trained"
            )
        return holders

    # ---------------------------------------------------------------- the step

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None, name_of: NameOf, **kwargs: Any) -> Any:
        """Steps `optimizer` on true gradients, or skips the step when they have inf or NaN.

        Returns the closure's result (it runs once, before the step) when there is one, else what the optimizer
        returns, None on a skip.

        Raises:
            RuntimeError: no loss was ever scaled, or the gradients come from one that was not.
            FloatingPointError: too many steps in a row were skipped.
        """
        record = self._record(optimizer)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._check_scaled(optimizer, record)
        if self._issued is None:
            raise RuntimeError(
                "optimizer.step() before any backward: there are no gradients yet. Call fabric.backward(loss) first"
            )
        if _gradients(optimizer):
            self.unscale(optimizer)
            returned = self._step_or_skip(optimizer, record, kwargs)
            result = returned if closure is None else result
            self._due = self._due or not record.counted
        else:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers ask for it
        record.gradients, record.stepped = _Gradients.NONE, True
        if all(self._records[each].stepped for each in self._of_the_run or self._records):
            self._update_if_due()
        self.check_skips(name_of)
        return result

    def _step_or_skip(self, optimizer: Optimizer, record: _Record, kwargs: dict[str, Any]) -> Any:
        step = original(optimizer, "step")
        if isinstance(record.found_inf, Tensor) and _skips_on_device(optimizer):
            optimizer.grad_scale, optimizer.found_inf = None, record.found_inf  # type: ignore[attr-defined]
            try:
                returned = step(**kwargs)
            finally:
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
            self.counter.add_later(record.found_inf)
            return returned
        if record.found_inf:
            self.counter.add(skipped=True)
            optimizer._opt_called = True  # type: ignore[attr-defined]
            return None
        returned = step(**kwargs)
        self.counter.add(skipped=False)
        return returned

    def check_skips(self, name_of: NameOf) -> None:
        """Raises `FloatingPointError` when `max_skips` steps in a row were skipped, naming where inf and NaN are."""
        if self.counter.skipped_in_a_row < self._max_skips:
            return
        bad = (
            name_of(param)
            for optimizer in list(self._records)
            for param in _params(optimizer)
            if param.grad is not None and not torch.isfinite(_values(param.grad)).all()
        )
        raise FloatingPointError(
            f"{self.counter.skipped_in_a_row} optimizer steps in a row were skipped, the loss scale is "
            f"{self.torch_scaler.get_scale():g}: inf or NaN in the gradients of "
            f"{_first(bad) or 'parameters whose gradients are gone by now'}. Look for NaN in the data or the loss, "
            'lower the learning rate, or use precision="bf16-mixed", which needs no scaling'
        )

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's own scaler state, after the update that is due."""
        self._update_if_due()
        return self.torch_scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned; raises `ValueError`, with nothing changed, for anything else."""
        for key, kinds in _SCALER_KEYS.items():
            value: Any = state.get(key)
            if type(value) not in kinds or not math.isfinite(value) or value < 0:
                raise ValueError(f"this is no state of a loss scaler: {key} is {value!r}")
        self._due = False
        old = self._value()
        self.torch_scaler.load_state_dict(state)
        self._scale_changed(old)


def _params(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _values(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [
        _values(param.grad) for group in optimizer.param_groups for param in group["params"] if param.grad is not None
    ]


def _skips_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer takes found_inf, and may be trusted with it.

    torch's fused SGD leaves a momentum buffer uninitialised when its first step is skipped.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return not isinstance(optimizer, SGD) or all(
        not group["momentum"] or all("momentum_buffer" in optimizer.state[param] for param in group["params"])
        for group in optimizer.param_groups
    )


def _first(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
