"""ScaledGradients: which gradients carry the loss scale, from the scaling of a loss until they are unscaled.

Gradients are unscaled at most once per optimizer and step. When the scale changes, the gradients that still carry the
old one are rescaled; when a loss is scaled while `p.grad` has unscaled gradients (a backward after a clip, no zero_grad
after a step), these are scaled first, so that the sum is right.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from precision_core.policy.dtypes import dtype_name
from precision_core.policy.messages import listed
from precision_core.scaling.gradients import all_finite, gradients_of, is_plain, params_of
from precision_core.scaling.records import UNSCALE_FIRST, Gradients, Record, Records, Ways, rescale
from precision_core.scaling.scale import Scale
from precision_core.scaling.scaler import NameOf, Scaler
from precision_core.scaling.watch import Watch

_SCALER_KEYS = {
    "scale": (float, int),
    "growth_factor": (float, int),
    "backoff_factor": (float, int),
    "growth_interval": (int,),
    "_growth_tracker": (int,),
}


class ScaledGradients(Scaler):
    """Scales the loss and unscales gradients; arguments as of `LossScaler`, which adds clipping and the step."""

    def __init__(
        self,
        torch_scaler: GradScaler,
        *,
        min_scale: float,
        max_skips: int,
        avoid_sync: bool,
        models: Collection[nn.Module] = (),
        refused: Container[torch.dtype] = (torch.float16,),
        name_of: NameOf = str,
        ways: Ways = UNSCALE_FIRST,
    ) -> None:
        super().__init__()
        self.torch_scaler = torch_scaler
        self._max_skips = max_skips
        self._refused = refused
        self._name_of = name_of
        self._scale = Scale(torch_scaler, floor=min_scale, avoid_sync=avoid_sync)
        self._records = Records(torch_scaler, name_of, avoid_sync=avoid_sync, ways=ways)
        self._watch = Watch(self._records, models, torch_scaler, name_of)
        self._last_scale: float | Tensor | None = None  # by which the last loss was scaled
        self._update_pending = False  # a step's found_inf waits for the update of the scale
        self._last_loss: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None  # scaled, and unscaled

    # ---------------------------------------------------------------- optimizers

    def register(self, optimizers: Iterable[Optimizer]) -> None:
        """Takes note of all optimizers of the run; without it they are known from their first clip or step.

        Raises:
            ValueError: LBFGS, or a parameter that another optimizer holds too.
        """
        for optimizer in optimizers:
            record = self._records.get(optimizer)
            if record is None:
                record = self._records.add(optimizer)
                if self._watch.unheld.carrying(params_of(optimizer)) is not None:  # set up between backward and step
                    record.gradients = Gradients.SCALED
            record.registered = True

    def _record(self, optimizer: Optimizer) -> Record:
        record = self._records.get(optimizer)
        if record is None:
            record = self._records.add(optimizer)
            if self._last_scale is not None:  # its gradients came from a scaled loss
                record.gradients = Gradients.SCALED
                followed = {id(gradient) for gradient in self._watch.unheld.gradients()}
                late = [gradient for gradient in gradients_of(optimizer) if id(gradient) not in followed]
                rescale(late, self._last_scale, self._scale.value())
        return record

    # ---------------------------------------------------------------- the scale

    @property
    def factor(self) -> float:
        self._update_if_pending()
        return self.torch_scaler.get_scale()

    def scale(self, loss: Tensor) -> Tensor:
        """Returns `loss` (any shape) times the scale; raises `RuntimeError` where scaled gradients were changed."""
        live = self._records.live()
        for optimizer, record in live:
            self._records.carry_scale(optimizer, record)
            if record.gradients is Gradients.UNSCALED:
                self._discard_check(optimizer, record)
        self._watch.begin(loss, live)
        self._update_if_pending()
        scaled = self._scale.times(loss)
        self._last_scale = self._scale.value()
        for optimizer, record in live:
            self._scale_again(optimizer, record, self._last_scale)
            record.gradients = Gradients.SCALED
            record.stepped, record.snapshot = False, None
        if self._watch.unheld:
            self._watch.unheld.before_backward()
        self._last_loss = (weakref.ref(scaled), weakref.ref(loss))
        return scaled

    def _scale_again(self, optimizer: Optimizer, record: Record, scale: float | Tensor) -> None:
        """Brings gradients that are there before a backward to the scale of its loss."""
        if record.gradients is not Gradients.SCALED:
            rescale(gradients_of(optimizer), 1.0, scale)

    def after_backward(self) -> None:
        """Notes that the backward of the scaled loss has ended: changes of gradients are seen from now on."""
        for optimizer, record in self._records.live():
            if record.gradients is Gradients.SCALED:
                record.look(optimizer)
        if self._watch.unheld:
            self._watch.unheld.after_backward()

    @contextmanager
    def replacing(self) -> Iterator[None]:
        right = [(optimizer, record) for optimizer, record in self._records.live() if record.is_unchanged(optimizer)]
        yield
        for optimizer, record in right:
            if record.snapshot is not None:
                record.look(optimizer)

    def unscaled(self, scaled: Tensor) -> Tensor:
        if self._last_loss is not None and self._last_loss[0]() is scaled:
            loss = self._last_loss[1]()
            if loss is not None:
                return loss
        return scaled.detach() / self.torch_scaler.get_scale()

    def _discard_check(self, optimizer: Optimizer, record: Record) -> None:
        """Discards the check of gradients that were unscaled, then dropped or added to instead of stepped.

        An overflow among dropped ones still lowers the scale; among kept ones it will be found again.
        """
        if not record.counted:
            if record.found_inf and all_finite(gradients_of(optimizer)):
                self._update_pending = True
            else:
                self.torch_scaler._per_optimizer_states.pop(id(optimizer), None)
        record.found_inf, record.counted = False, True

    def _update_if_pending(self) -> None:
        if self._update_pending:
            self._update_pending = False
            old = self._scale.value()
            self._scale.update()
            self._follow(old)

    def _follow(self, old: float | Tensor) -> None:
        """Brings gradients that carry the old scale to the new one; earlier checks have had their effect on it."""
        new = self._scale.value()
        for optimizer, record in self._records.live():
            record.counted = True
            if record.gradients is Gradients.SCALED:
                is_known = record.is_unchanged(optimizer)
                rescale(gradients_of(optimizer), old, new)
                if is_known:  # else its step is to raise
                    record.look(optimizer)
        rescale([*self.unsynced(), *self._watch.unheld.gradients()], old, new)  # they always carry the scale

    # ---------------------------------------------------------------- unscaled gradients

    def unscale(self, optimizer: Optimizer) -> None:
        """Divides the gradients of `optimizer` by the scale, at most once until it steps."""
        self._unscale_once(optimizer)

    def _unscale_once(self, optimizer: Optimizer) -> None:
        record, gradients = self._record(optimizer), gradients_of(optimizer)
        if self._records.carry_scale(optimizer, record, gradients):
            self._unscale(optimizer, record, gradients)
            self._watch.rest()

    def _unscale(self, optimizer: Optimizer, record: Record, gradients: list[Tensor]) -> None:
        if not is_plain(gradients):
            self._check_dtypes(optimizer)
        self._records.now_unscaled(optimizer, record, self._scale.unscale(optimizer, gradients))

    def _check_dtypes(self, optimizer: Optimizer) -> None:
        """Raises `ValueError` for gradients of a dtype that setup refuses: their parameters began to train after it."""
        wrong = [
            f"{self._name_of(param)} ({dtype_name(param.grad.dtype)})"
            for param in params_of(optimizer)
            if param.grad is not None and (param.grad.dtype in self._refused or param.grad.is_complex())
        ]
        if wrong:
            raise ValueError(
                f"16-mixed scales the loss, and unscales no half and no complex gradients: {listed(wrong, 5)}. They "
                "train since fabric.setup, or came with add_param_group: freeze them with requires_grad_(False), cast "
                'them to float32 before setup, or use precision="bf16-mixed", which does not scale [half-parameters]'
            )

    def teardown(self) -> None:
        """Unscales gradients that were not stepped: whoever steps them now does not know of the scale."""
        for optimizer, record in self._records.live():
            if record.gradients is Gradients.SCALED:
                rescale(gradients_of(optimizer), self._scale.value(), 1.0)
                record.gradients, record.snapshot = Gradients.NONE, None
        rescale(self._watch.unheld.gradients(), self._scale.value(), 1.0)
        self._watch.end()

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of torch's scaler, after a pending update of the scale."""
        self._update_if_pending()
        return self.torch_scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned; raises `ValueError`, with nothing changed, for anything else."""
        for key, kinds in _SCALER_KEYS.items():
            value: Any = state.get(key)
            if type(value) not in kinds or not math.isfinite(value) or value < 0:
                raise ValueError(f"not the state of a loss scaler: {key} is {value!r}")
        self._update_pending = False
        old = self._scale.value()
        self.torch_scaler.load_state_dict(state)
        self._follow(old)
