"""Loss scaling on top of torch's GradScaler: who unscales what, when the scale moves, and what a step does.

torch's scaler owns the scale, its growth, and the check for inf and NaN. What it leaves to the order of the user's
calls is kept here: one record per optimizer (records.py), and which gradients carry the scale (scaled_gradients.py).

The scale is updated as soon as every optimizer of the run has stepped since the last scaling, else at the next scaling,
`state_dict` or read of `factor`. Steps of others and changes by others, while gradients carry the scale, raise before
anything moves (watch.py, guard.py).

Sources: torch.amp.GradScaler; P. Micikevicius et al., Mixed Precision Training (arXiv 1710.03740).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from precision_core.override import original
from precision_core.policy.messages import listed
from precision_core.scaling.gradients import (
    all_finite,
    gradients_of,
    params_of,
    runs_closure_first,
    skips_on_device,
    takes_flag,
)
from precision_core.scaling.records import Gradients, Record
from precision_core.scaling.scaled_gradients import ScaledGradients
from precision_core.scaling.scaler import NameOf


class _SkippedError(Exception):
    """Leaves a step whose closure has overflowed."""


class LossScaler(ScaledGradients):
    """Scales the loss with `torch_scaler`, an enabled GradScaler.

    Args:
        min_scale: the scale does not fall below this, unless it started there.
        max_skips: so many skipped steps in a row raise `FloatingPointError`.
        avoid_sync: leave the flag "inf or NaN found" on its device where the optimizer can skip there (fused ones), so
            that no step waits for the device.
        models: returns the models of the run, whose gradients no other optimizer may step while they are scaled.
        refused: dtypes in which no gradient may be.
        name_of: gives a parameter's name, for messages.
    """

    def __init__(
        self,
        torch_scaler: GradScaler,
        *,
        min_scale: float,
        max_skips: int,
        avoid_sync: bool,
        models: Callable[[], Collection[nn.Module]] = tuple,
        refused: Container[torch.dtype] = (torch.float16,),
        name_of: NameOf = str,
    ) -> None:
        super().__init__(
            torch_scaler, min_scale=min_scale, avoid_sync=avoid_sync, models=models, refused=refused, name_of=name_of
        )
        self._max_skips = max_skips

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None, name_of: NameOf, **kwargs: Any) -> Any:
        """Steps `optimizer` on true gradients, or skips the step when they have inf or NaN.

        Returns the closure's result when there is one, else what the optimizer returns, None on a skip. Steps of
        torch's optimizers have their closure run once, before them; to others it is handed on, with true gradients.

        Raises:
            RuntimeError: no loss was ever scaled, or the gradients come from one that was not.
            FloatingPointError: too many steps in a row were skipped.
        """
        record = self._record(optimizer)
        result = None
        if closure is not None:
            if not runs_closure_first(optimizer):
                return self._step_with(closure, optimizer, record, name_of, kwargs)
            with torch.enable_grad():
                result = closure()
        gradients = gradients_of(optimizer)
        self._records.check_scaled(optimizer, record, gradients)
        if self._last_scale is None:
            raise RuntimeError(
                "optimizer.step() before any backward: there are no gradients yet. Call fabric.backward(loss) first"
            )
        if gradients:
            if self._records.is_scaled(optimizer, record):
                self._records.check_unchanged(optimizer, record)
                self._unscale(optimizer, record, gradients)
            returned = self._step_or_skip(optimizer, record, kwargs)
            result = returned if closure is None else result
            self._update_pending = self._update_pending or not record.counted
        else:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers ask for it
        self._after_step(record, name_of)
        return result

    def _after_step(self, record: Record, name_of: NameOf) -> None:
        record.steps += 1
        record.gradients, record.stepped, record.snapshot = Gradients.NONE, True, None
        self._watch.rest()
        if self._update_pending and (len(self._records) == 1 or self._records.all_stepped()):
            self._update_if_pending()
        if self.counter.skipped_in_a_row:
            self.check_skips(name_of)

    def _step_with(
        self,
        closure: Callable[[], Any],
        optimizer: Optimizer,
        record: Record,
        name_of: NameOf,
        kwargs: dict[str, Any],
    ) -> Any:
        """Steps an optimizer that calls the closure itself, as often as it wants; each call leaves true gradients.

        The step is skipped when the first call overflows and no parameter has moved. Else parameters lie between two
        steps, and the closure is run again with a lower scale.
        """
        results: list[Any] = []
        gradients = gradients_of(optimizer)
        if gradients and self._records.is_scaled(optimizer, record):  # of a backward before the step, as SAM wants
            self.unscale(optimizer)
        before = [param._version for param in params_of(optimizer)]

        def evaluate() -> Any:
            for _ in range(self._max_skips):
                had = {id(param) for param in params_of(optimizer) if param.grad is not None}
                with torch.enable_grad():
                    results.append(closure())
                self.unscale(optimizer)
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
                f"the loss scale is {self.torch_scaler.get_scale():g}. Look for NaN in the data or the loss, lower the "
                'learning rate, or use precision="bf16-mixed", which needs no scaling'
            )

        skipped = bool(record.found_inf) and record.gradients is Gradients.UNSCALED
        if not skipped:
            try:
                original(optimizer, "step")(evaluate, **kwargs)
            except _SkippedError:
                skipped = True
        self.counter.add(skipped)
        optimizer._opt_called = True  # type: ignore[attr-defined]
        self._update_pending = self._update_pending or not record.counted
        self._after_step(record, name_of)
        return results[0] if results else None

    def _step_or_skip(self, optimizer: Optimizer, record: Record, kwargs: dict[str, Any]) -> Any:
        step = original(optimizer, "step")
        if isinstance(record.found_inf, Tensor) and takes_flag(optimizer):
            returned = step(found_inf=record.found_inf, **kwargs)
            self.counter.add_later(record.found_inf)
            return returned
        if isinstance(record.found_inf, Tensor) and skips_on_device(optimizer):
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
            for optimizer, _ in self._records.live()
            for param in params_of(optimizer)
            if param.grad is not None and not all_finite([param.grad])
        )
        raise FloatingPointError(
            f"{self.counter.skipped_in_a_row} optimizer steps in a row were skipped, the loss scale is "
            f"{self.torch_scaler.get_scale():g}: inf or NaN in the gradients of "
            f"{listed(bad, 5) or 'parameters whose gradients are gone by now'}. Look for NaN in the data or the loss, "
            'lower the learning rate, or use precision="bf16-mixed", which needs no scaling'
        )
