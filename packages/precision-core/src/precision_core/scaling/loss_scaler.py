"""Loss scaling on top of torch's GradScaler: what clipping and a step do, and when the scale is updated.

torch's scaler owns the scale, its growth, and the check for inf and NaN. What it leaves to the order of the user's
calls is kept here: one record per optimizer (records.py), and which gradients carry the scale (scaled_gradients.py).

The scale is updated as soon as every optimizer of the run has stepped since the last scaling, else at the next scaling,
`state_dict` or read of `factor`. A step by an unknown optimizer, and a change of gradients that carry the scale, raise
before any parameter changes (watch.py, guard.py).

Sources: torch.amp.GradScaler; P. Micikevicius et al., Mixed Precision Training (arXiv 1710.03740).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.override import original
from precision_core.policy.messages import listed
from precision_core.scaling.clipping import Clip, clip_unscaled
from precision_core.scaling.gradients import (
    all_finite,
    clip_scaled,
    gradients_of,
    is_plain,
    params_of,
    runs_closure_first,
    skips_on_device,
    takes_flag,
)
from precision_core.scaling.records import Gradients, Record
from precision_core.scaling.scaled_gradients import ScaledGradients
from precision_core.scaling.scaler import NameOf

_ADVICE = (
    "Look for NaN in the data or the loss, with hooks that name the layer (the recipe nan.md in the docs); lower the "
    'learning rate; let one layer stay float32 (precision="{}; NAME: 32-true"), or use precision="{}", '
    "which needs no scaling"
)


class _SkippedError(Exception):
    """Leaves a step whose closure has overflowed."""


class LossScaler(ScaledGradients):
    """Scales the loss with `torch_scaler`, an enabled GradScaler.

    Args:
        min_scale: the scale does not fall below this, unless it started there.
        max_skips: raise `FloatingPointError` after this many consecutive skipped steps.
        avoid_sync: leave the flag "inf or NaN found" on its device where the optimizer can skip there (fused ones), so
            that no step waits for the device.
        models: those of the run, whose gradients no other optimizer may step while they carry the scale.
        refused: dtypes that gradients may not have.
        name_of: gives a parameter's name, for messages.
    """

    _advice = _ADVICE.format("16-mixed", "bf16-mixed")

    def clip(
        self, optimizer: Optimizer | None, params: list[nn.Parameter], clip: Clip, name_of: NameOf
    ) -> Tensor | None:
        """Unscales and clips the gradients of `params`; returns their unscaled norm for `max_norm`, else None.

        Gradients with inf or NaN lead to a skipped step, not to an error, unless `clip.error_if_nonfinite`.
        """
        optimizers = [optimizer] if optimizer is not None else self._holders(params, name_of)
        held = {each: gradients_of(each) for each in optimizers}
        carries = [self._records.carry_scale(each, self._record(each), held[each]) for each in optimizers]
        gradients = [param.grad for param in params if param.grad is not None]
        at_once = (
            clip.max_norm is not None
            and all(carries)
            and len(gradients) == sum(map(len, held.values()))  # no optimizer holds more than is clipped
            and is_plain(gradients)
        )
        if at_once:
            scale = self.torch_scaler.get_scale() if clip.error_if_nonfinite else self._scale.value()
            result = clip_scaled(gradients, scale, clip)
            if result is not None:
                for each in optimizers:
                    self._records.now_unscaled(each, self._record(each), result[1].clone())
                self._watch.rest()
                return result[0]
        for each in optimizers:
            self._unscale_once(each)
        return clip_unscaled(params, clip)

    def _holders(self, params: list[nn.Parameter], name_of: NameOf) -> list[Optimizer]:
        wanted = {id(param): param for param in params if param.grad is not None}
        holders = []
        for optimizer, _ in self._records.live():
            held = {id(param) for param in params_of(optimizer)} & wanted.keys()
            if held:
                holders.append(optimizer)
                for key in held:
                    del wanted[key]
        if wanted:
            raise ValueError(
                "clip_gradients(model) found scaled gradients that no known optimizer holds: "
                f"{listed(map(name_of, wanted.values()), 5)}. Pass the optimizer, give it to fabric.setup, "
                "or call requires_grad_(False) on parameters that are not trained [scaled-gradients]"
            )
        return holders

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None, name_of: NameOf, **kwargs: Any) -> Any:
        """Steps `optimizer` on unscaled gradients, or skips the step when they have inf or NaN.

        Returns the closure's result when there is one, else what the optimizer returns, None on a skip. A closure of
        torch's optimizers runs once, before the step; others get it, and find unscaled gradients after each call.

        Raises:
            RuntimeError: no loss was scaled yet, or the gradients come from one that was not.
            FloatingPointError: `max_skips` steps in a row were skipped.
        """
        record = self._record(optimizer)
        result = None
        if closure is not None:
            if not runs_closure_first(optimizer):
                return self._step_with(closure, optimizer, record, name_of, kwargs)
            with torch.enable_grad():
                result = closure()
        gradients = gradients_of(optimizer)
        carries = self._records.carry_scale(optimizer, record, gradients)
        if self._last_scale is None:
            raise RuntimeError(
                "optimizer.step() before any backward: there are no gradients yet. Call fabric.backward(loss) first"
                " [step-before-backward]"
            )
        record.skipped = False
        if gradients:
            if carries:
                self._unscale(optimizer, record, gradients)
            record.stepping = True
            try:
                returned = self._step_or_skip(optimizer, record, kwargs)
            finally:
                record.stepping = False
            result = returned if closure is None else result
            self._update_pending = self._update_pending or not record.counted
        self._after_step(optimizer, record, name_of)
        return result

    def _after_step(self, optimizer: Optimizer, record: Record, name_of: NameOf) -> None:
        optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers ask for it, after a skip too
        record.steps += 1
        record.gradients, record.stepped, record.snapshot = Gradients.NONE, True, None
        self._watch.rest()
        if self._update_pending and (len(self._records) == 1 or self._records.all_stepped()):
            self._update_if_pending()
        if self.counter.skipped_in_a_row:
            self.check_skips(name_of)

    def _step_with(
        self, closure: Callable[[], Any], optimizer: Optimizer, record: Record, name_of: NameOf, kwargs: dict[str, Any]
    ) -> Any:
        """Steps an optimizer that calls the closure itself, any number of times; each call leaves unscaled gradients.

        The step is skipped when the first call overflows and no parameter has changed. Else parameters are between two
        steps, and the closure is run again with a lower scale.
        """
        results: list[Any] = []
        gradients = gradients_of(optimizer)
        if gradients and self._records.is_scaled(optimizer, record):  # of a backward before the step, as SAM wants
            self._unscale_once(optimizer)
        before = [param._version for param in params_of(optimizer)]

        def evaluate() -> Any:
            for _ in range(self._max_skips):
                had = {id(param) for param in params_of(optimizer) if param.grad is not None}
                with torch.enable_grad():
                    results.append(closure())
                self._unscale_once(optimizer)
                if not record.found_inf:
                    return results[-1]
                if before == [param._version for param in params_of(optimizer)]:
                    raise _SkippedError
                self._update_pending = True
                self._update_if_pending()
                for param in params_of(optimizer):
                    if id(param) not in had:  # else the closure drops them itself
                        param.grad = None
            raise FloatingPointError(
                f"{type(optimizer).__name__}: inf or NaN in its closure's gradients {self._max_skips} times in a row, "
                f"the loss scale is {self.torch_scaler.get_scale():g}. {self._advice} [no-finite-gradients]"
            )

        skipped = bool(record.found_inf) and record.gradients is Gradients.UNSCALED
        if not skipped:
            record.stepping = True
            try:
                original(optimizer, "step")(evaluate, **kwargs)
            except _SkippedError:
                skipped = True
            finally:
                record.stepping = False
        record.skipped = skipped
        self.counter.add(skipped)
        self._update_pending = self._update_pending or not record.counted
        self._after_step(optimizer, record, name_of)
        return results[0] if results else None

    def _step_or_skip(self, optimizer: Optimizer, record: Record, kwargs: dict[str, Any]) -> Any:
        step, flag = original(optimizer, "step"), record.found_inf
        if isinstance(flag, Tensor) and takes_flag(optimizer):
            returned = step(found_inf=flag, **kwargs)
        elif isinstance(flag, Tensor) and skips_on_device(optimizer):
            optimizer.grad_scale, optimizer.found_inf = None, flag  # type: ignore[attr-defined]
            try:
                returned = step(**kwargs)
            finally:
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        else:
            record.skipped = bool(flag)
            returned = None if record.skipped else step(**kwargs)
            self.counter.add(record.skipped)
            return returned
        record.skipped = flag
        self.counter.add_later(flag)
        return returned

    def was_skipped(self, optimizer: Optimizer) -> bool | Tensor:
        """Whether the last step of `optimizer` was skipped; a tensor, not zero if so, where only its device knows."""
        record = self._records.get(optimizer)
        return False if record is None else record.skipped

    def check_skips(self, name_of: NameOf) -> None:
        """Raises `FloatingPointError` after `max_skips` skipped steps in a row; names parameters with inf or NaN."""
        if self.counter.skipped_in_a_row < self._max_skips:
            return
        bad = (
            name_of(param)
            for optimizer, _ in self._records.live()
            for param in params_of(optimizer)
            if param.grad is not None and not all_finite([param.grad])
        )
        raise FloatingPointError(
            f"{self.counter.skipped_in_a_row} optimizer steps in a row were skipped, the loss scale is "
            f"{self.torch_scaler.get_scale():g}: inf or NaN in the gradients of "
            f"{listed(bad, 5) or 'parameters whose gradients are gone by now'}. {self._advice} [no-finite-gradients]"
        )
