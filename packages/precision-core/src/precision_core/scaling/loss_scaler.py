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

Steps of others and changes by others, while gradients carry the scale, raise before anything moves (see guard.py).

Sources: torch.amp.GradScaler; P. Micikevicius et al., Mixed Precision Training (arXiv 1710.03740).
"""

from __future__ import annotations

import enum
import math
import warnings
import weakref
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import LBFGS, Optimizer

from precision_core.override import original
from precision_core.scaling.clipping import Clip, clip_true_gradients
from precision_core.scaling.gradients import (
    all_finite,
    clip_scaled,
    gradients_of,
    is_plain,
    multiply,
    params_of,
    runs_closure_first,
    skips_on_device,
    takes_flag,
    unscale_plain,
)
from precision_core.scaling.guard import Snapshot, StepHook, Unheld, stepping, wraps
from precision_core.scaling.scaler import NameOf, Scaler

_SCALER_KEYS = {
    "scale": (float, int),
    "growth_factor": (float, int),
    "backoff_factor": (float, int),
    "growth_interval": (int,),
    "_growth_tracker": (int,),
}


_FIRST_STEPS = 3
"""In so many steps the values of sharded gradients are looked at, which tell of changes that no version tells of."""


class _Gradients(enum.Enum):
    NONE = enum.auto()
    SCALED = enum.auto()
    TRUE = enum.auto()


class _SkippedError(Exception):
    """Leaves a step whose closure has overflowed."""


class _Record:
    """What is known of one optimizer's gradients."""

    def __init__(self, reference: weakref.ref[Optimizer]) -> None:
        self.reference = reference
        self.of_the_run = False
        self.gradients = _Gradients.NONE
        self.stepped = False  # since the last scaling
        self.found_inf: bool | Tensor = False  # in gradients that are TRUE; a tensor where the host must not wait
        self.counted = True  # found_inf has gone into an update of the scale
        self.steps = 0
        self.snapshot: Snapshot | None = None  # of gradients that are SCALED, where the end of backward was seen


class LossScaler(Scaler):
    """Scales the loss with `torch_scaler`, an enabled GradScaler.

    Args:
        min_scale: the scale does not fall below this, unless it started there.
        max_skips: so many skipped steps in a row raise `FloatingPointError`.
        lazy: leave the flag "inf or NaN found" on its device where the optimizer can skip there (fused ones), so that
            the host does not wait for it.
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
        lazy: bool,
        models: Callable[[], Collection[nn.Module]] = tuple,
        refused: Container[torch.dtype] = (torch.float16,),
        name_of: NameOf = str,
    ) -> None:
        super().__init__()
        self.torch_scaler = torch_scaler
        self._min_scale = min_scale
        self._max_skips = max_skips
        self._lazy = lazy
        # On the CPU the parts of torch's scaler are called directly; a subclass may reduce over ranks in its methods.
        self._is_plain = not lazy and type(torch_scaler) is GradScaler
        self._records: dict[int, _Record] = {}  # by id of the optimizer
        self._issued: float | Tensor | None = None  # the scale of the last scaling
        self._read: tuple[Tensor, int, float] | None = None  # the scale, its version, and its value when last read
        self._inverse: tuple[float, Tensor] | None = None  # a scale, and a tensor of 1 / scale
        self._due = False  # a step's found_inf waits for the update of the scale
        self._last_loss: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None  # scaled, and as it was
        self._models = models
        self._refused = refused
        self._name_of = name_of
        self._hook: StepHook[LossScaler] | None = None
        self._unheld = Unheld(models)
        self._found: tuple[int, int] | None = None  # how many optimizers and models there were when it last looked
        self._warned = False

    # ---------------------------------------------------------------- optimizers

    def register(self, optimizers: Iterable[Optimizer]) -> None:
        """Takes note of all optimizers of the run; without it they are known from their first clip or step.

        Raises:
            ValueError: LBFGS, or a parameter that another optimizer holds too.
        """
        for optimizer in optimizers:
            if id(optimizer) not in self._records:
                record = self._new_record(optimizer)
                if self._unheld.carrying(params_of(optimizer)) is not None:  # set up between backward and step
                    record.gradients = _Gradients.SCALED
            self._records[id(optimizer)].of_the_run = True

    def _record(self, optimizer: Optimizer) -> _Record:
        record = self._records.get(id(optimizer))
        if record is None:
            record = self._new_record(optimizer)
            if self._issued is not None:  # its gradients came from a scaled loss
                record.gradients = _Gradients.SCALED
                followed = {id(gradient) for gradient in self._unheld.gradients()}
                late = [gradient for gradient in gradients_of(optimizer) if id(gradient) not in followed]
                _rescale(late, self._issued, self._value())
        return record

    def _new_record(self, optimizer: Optimizer) -> _Record:
        self._check(optimizer)
        key, records = id(optimizer), self._records
        record = records[key] = _Record(weakref.ref(optimizer, lambda _: records.pop(key, None)))
        self._found = None
        return record

    def _live(self) -> list[tuple[Optimizer, _Record]]:
        pairs = [(record.reference(), record) for record in list(self._records.values())]
        return [(optimizer, record) for optimizer, record in pairs if optimizer is not None]

    def _check(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS evaluates the loss several times a step and cannot run with a scaled loss: "
                'use another optimizer, or a mode that does not scale such as precision="bf16-mixed"'
            )
        ours = {id(param) for param in params_of(optimizer)}
        for other, _ in self._live():
            if any(id(param) in ours for param in params_of(other)):
                raise ValueError(
                    f"{type(optimizer).__name__} and {type(other).__name__} hold the same parameter: under "
                    "a scaled loss gradients are unscaled per optimizer, so each parameter may be in one optimizer only"
                )

    # ---------------------------------------------------------------- the scale

    @property
    def factor(self) -> float:
        """The loss scale, after the update that is due."""
        self._update_if_due()
        return self.torch_scaler.get_scale()

    def scale(self, loss: Tensor) -> Tensor:
        """Returns `loss` (any shape) times the scale."""
        live = self._live()
        for optimizer, record in live:
            if self._is_scaled(optimizer, record):
                self._check_unchanged(optimizer, record)
            elif record.gradients is _Gradients.TRUE:
                self._withdraw(optimizer, record)
        self._watch(live)
        self._update_if_due()
        factor = self.torch_scaler._scale
        if self._is_plain and factor is not None and loss.is_cpu:
            scaled = loss * factor
        else:
            scaled = self.torch_scaler.scale(loss)
        self._issued = self._value()
        for optimizer, record in live:
            if record.gradients is not _Gradients.SCALED:
                _rescale(gradients_of(optimizer), 1.0, self._issued)
                record.gradients = _Gradients.SCALED
            record.stepped, record.snapshot = False, None
        if self._unheld:
            self._unheld.before_backward()
        self._last_loss = (weakref.ref(scaled), weakref.ref(loss))
        return scaled

    def after_backward(self) -> None:
        """Takes note that the backward of the scaled loss has ended: gradients that change from now on are seen."""
        for record in self._records.values():
            optimizer = record.reference()
            if record.gradients is _Gradients.SCALED and optimizer is not None:
                record.snapshot = Snapshot(optimizer, shards=record.steps < _FIRST_STEPS)
        if self._unheld:
            self._unheld.after_backward()

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Context in which an engine, not the user, may put equal gradients in the place of those that are there."""
        right = [
            (optimizer, record)
            for optimizer, record in self._live()
            if record.snapshot is not None and not record.snapshot.changed(optimizer)
        ]
        yield
        for optimizer, record in right:
            if record.snapshot is not None:
                record.snapshot = Snapshot(optimizer, shards=record.steps < _FIRST_STEPS)

    def unscaled(self, scaled: Tensor) -> Tensor:
        """Returns the loss that `scale` was given."""
        if self._last_loss is not None and self._last_loss[0]() is scaled:
            loss = self._last_loss[1]()
            if loss is not None:
                return loss
        return scaled.detach() / self.torch_scaler.get_scale()

    def _withdraw(self, optimizer: Optimizer, record: _Record) -> None:
        """Takes back the check of gradients that were clipped and then dropped or added to instead of stepped.

        An overflow among dropped ones still lowers the scale; among kept ones it will be found again.
        """
        if not record.counted:
            if record.found_inf and all_finite(gradients_of(optimizer)):
                self._due = True
            else:
                self.torch_scaler._per_optimizer_states.pop(id(optimizer), None)
        record.found_inf, record.counted = False, True

    def _value(self) -> float | Tensor:
        """The scale as it is now: a number, or a copy on the device where the host must not wait for one."""
        scale = self.torch_scaler._scale
        if scale is None:  # no loss was scaled yet
            return self.torch_scaler.get_scale()
        if self._lazy:
            return scale.clone()
        if self._read is None or self._read[0] is not scale or self._read[1] != scale._version:
            self._read = (scale, scale._version, scale.item())
        return self._read[2]

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
        elif self._value() < min(old, self._min_scale):
            self.torch_scaler.update(min(old, self._min_scale))
        self._follow(old)

    def _follow(self, old: float | Tensor) -> None:
        """Brings gradients that carry the old scale to the new one; what was found before it has had its effect."""
        new = self._value()
        for optimizer, record in self._live():
            record.counted = True
            if record.gradients is _Gradients.SCALED:
                is_known = record.snapshot is not None and not record.snapshot.changed(optimizer)
                _rescale(gradients_of(optimizer), old, new)
                if is_known:  # else its step is to raise
                    record.snapshot = Snapshot(optimizer, shards=record.steps < _FIRST_STEPS)
        _rescale([*self.held_back(), *self._unheld.gradients()], old, new)  # they always carry the scale

    # ---------------------------------------------------------------- steps and changes of others

    def _watch(self, live: list[tuple[Optimizer, _Record]]) -> None:
        """Has every step be seen from now on, until no gradients carry the scale."""
        self._find_unheld(live)
        if not self._warned:
            self._check_left(live)
        if self._unheld and self._unheld.trains():  # a closure runs after the hook of the step that calls it
            for optimizer in stepping():
                if id(optimizer) not in self._records:
                    self._check_foreign(optimizer, self._unheld.in_models)
        if self._hook is None:
            self._hook = StepHook(self, LossScaler._before_step)
        self._hook.add()

    def _find_unheld(self, live: list[tuple[Optimizer, _Record]]) -> None:
        found = (len(live), len(self._models()))
        if self._found != found:
            self._found = found
            self._unheld.find({id(param) for optimizer, _ in live for param in params_of(optimizer)})

    def _rest(self) -> None:
        """Ends `_watch` where no gradients are known to carry the scale."""
        if self._hook is None or any(record.gradients is _Gradients.SCALED for record in self._records.values()):
            return
        if self._found is None:  # an optimizer has come, which may hold them now
            self._find_unheld(self._live())
        if not self._unheld or not self._unheld.gradients():
            self._hook.remove()

    def _before_step(self, optimizer: Optimizer) -> None:
        """Raises `RuntimeError` where `optimizer`, anybody's, is about to step gradients that carry the scale."""
        record = self._records.get(id(optimizer))
        if record is None:
            self._check_foreign(optimizer, self._unheld.carrying)
        elif record.gradients is _Gradients.SCALED and self._is_scaled(optimizer, record) and gradients_of(optimizer):
            raise RuntimeError(
                f"{type(optimizer).__name__} was about to step gradients that carry the loss scale, by a call that "
                "went past what fabric.setup(model, optimizer) put on it: call optimizer.step() of the very object, or "
                "without Fabric precision.optimizer_step(optimizer, model, None)"
            )

    def _check_foreign(
        self, optimizer: Optimizer, find: Callable[[Iterable[nn.Parameter]], nn.Parameter | None]
    ) -> None:
        """Raises `RuntimeError` where others hold parameters of `optimizer`, or `find` returns one of the rest."""
        holders = {id(param): (holder, record) for holder, record in self._live() for param in params_of(holder)}
        params = list(params_of(optimizer))
        for param in params:
            holder, record = holders.get(id(param), (None, None))
            if holder is None or record is None or param.grad is None or wraps(optimizer, holder):
                continue
            if self._is_scaled(holder, record):
                raise RuntimeError(
                    f"{type(optimizer).__name__} was about to step gradients that carry the loss scale. "
                    f"{type(holder).__name__}, which fabric.setup was given, holds the same parameters: call its "
                    f"step, or fabric.unscale_gradients on it before {type(optimizer).__name__} steps"
                )
        scaled = find(param for param in params if id(param) not in holders)
        if scaled is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__} was not set up, and was about to step gradients that carry the loss "
                f"scale, such as that of {self._name_of(scaled)}: give it to fabric.setup(model, optimizer), or to "
                "fabric.setup_optimizers(optimizer) where it is made later; without Fabric call "
                "precision.optimizer_step(optimizer, model, None)"
            )

    def _is_scaled(self, optimizer: Optimizer, record: _Record) -> bool:
        """Whether its gradients carry the scale, and nobody has called `unscale_` of torch's scaler on it."""
        if record.gradients is _Gradients.SCALED:
            state = self.torch_scaler._per_optimizer_states.get(id(optimizer))
            if state is not None and state["stage"] is OptState.UNSCALED:
                self._now_true(optimizer, record)
        return record.gradients is _Gradients.SCALED

    def _check_unchanged(self, optimizer: Optimizer, record: _Record) -> None:
        changed = record.snapshot.changed(optimizer) if record.snapshot is not None else ()
        if changed:
            raise RuntimeError(
                f"the gradients of {_first(map(self._name_of, changed))} were changed after fabric.backward, while "
                f"they carried the loss scale ({self.torch_scaler.get_scale():g}). Call "
                "fabric.unscale_gradients(optimizer) before anything reads or changes p.grad, or clip with "
                f"fabric.clip_gradients(model, optimizer, max_norm=...); zero_grad() of {type(optimizer).__name__} "
                "drops them"
            )

    def _check_left(self, live: list[tuple[Optimizer, _Record]]) -> None:
        """Warns once of updates that no hook has seen, where what they leave behind tells of them."""
        updated, unstepped = self._unheld.left() if self._unheld else ([], [])
        for optimizer, record in live:
            if record.gradients is _Gradients.SCALED and record.snapshot is not None:
                updated += record.snapshot.updated(optimizer)
        if not updated and not unstepped:
            return
        self._warned = True
        what = (
            f"{_first(map(self._name_of, updated))} changed while their gradients carried the loss scale, and no step "
            "that the precision knows of did that. An update by hand, or a method such as first_step, reads gradients "
            f"that are {self.torch_scaler.get_scale():g} times too large: call fabric.unscale_gradients(optimizer) "
            "before it"
            if updated
            else f"{_first(map(self._name_of, unstepped))} have gradients that carry the loss scale, and that nobody "
            "stepped or dropped: no optimizer that was set up holds them. Give it to fabric.setup(model, optimizer) or "
            "fabric.setup_optimizers(optimizer), or call requires_grad_(False) on what does not train"
        )
        warnings.warn(what, stacklevel=7)

    # ---------------------------------------------------------------- true gradients

    def unscale(self, optimizer: Optimizer) -> None:
        """Divides the gradients of `optimizer` by the scale, at most once until it steps."""
        record = self._record(optimizer)
        gradients = gradients_of(optimizer)
        self._check_scaled(optimizer, record, gradients)
        if self._is_scaled(optimizer, record):
            self._check_unchanged(optimizer, record)
            self._unscale(optimizer, record, gradients)
            self._rest()

    def _unscale(self, optimizer: Optimizer, record: _Record, gradients: list[Tensor]) -> None:
        if not is_plain(gradients):
            self._check_dtypes(optimizer)
        if self._is_plain and is_plain(gradients) and gradients[0].is_cpu:
            scale = self._value()
            assert isinstance(scale, float)
            if self._inverse is None or self._inverse[0] != scale:
                self._inverse = (scale, torch.tensor(1.0 / scale))
            self._now_true(optimizer, record, unscale_plain(gradients, self._inverse[1]))
        else:
            self.torch_scaler.unscale_(optimizer)
            self._now_true(optimizer, record)

    def _check_dtypes(self, optimizer: Optimizer) -> None:
        """Raises `ValueError` for gradients that setup would have refused: they began to train after it."""
        wrong = [
            f"{self._name_of(param)} ({str(param.grad.dtype).removeprefix('torch.')})"
            for param in params_of(optimizer)
            if param.grad is not None and (param.grad.dtype in self._refused or param.grad.is_complex())
        ]
        if wrong:
            raise ValueError(
                f"16-mixed scales the loss, and unscales no half and no complex gradients: {_first(wrong)}. They train "
                "since fabric.setup, or came with add_param_group: freeze them with requires_grad_(False), cast "
                'them to float32 before setup, or use precision="bf16-mixed", which does not scale'
            )

    def _now_true(self, optimizer: Optimizer, record: _Record, flag: Tensor | None = None) -> None:
        """Notes what the check of the gradients found; `flag` is given when it was not torch's scaler that checked."""
        if flag is not None:
            state = self.torch_scaler._per_optimizer_states[id(optimizer)]
            state["stage"], state["found_inf_per_device"] = OptState.UNSCALED, {flag.device: flag}
        flags = [flag] if flag is not None else list(self.torch_scaler._found_inf_per_device(optimizer).values())
        if self._lazy and flags:
            record.found_inf = torch.stack([each.to(flags[0].device) for each in flags]).sum()
        else:
            record.found_inf = sum([each.item() for each in flags]) != 0
        record.gradients, record.counted, record.snapshot = _Gradients.TRUE, not flags, None

    def _check_scaled(self, optimizer: Optimizer, record: _Record, gradients: list[Tensor]) -> None:
        if record.gradients is _Gradients.NONE and gradients:
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
        held = {each: gradients_of(each) for each in optimizers}
        for each, gradients in held.items():
            self._check_scaled(each, self._record(each), gradients)
            if self._is_scaled(each, self._record(each)):
                self._check_unchanged(each, self._record(each))
        gradients = [param.grad for param in params if param.grad is not None]
        at_once = (
            clip.max_norm is not None
            and all(self._record(each).gradients is _Gradients.SCALED for each in optimizers)
            and len(gradients) == sum(map(len, held.values()))  # no optimizer holds more than is clipped
            and is_plain(gradients)
        )
        if at_once:
            scale = self.torch_scaler.get_scale() if clip.error_if_nonfinite else self._value()
            result = clip_scaled(gradients, scale, clip)
            if result is not None:
                for each in optimizers:
                    self._now_true(each, self._record(each), result[1].clone())
                self._rest()
                return result[0]
        for each in optimizers:
            self.unscale(each)
        return clip_true_gradients(params, clip)

    def _holders(self, params: list[nn.Parameter], name_of: NameOf) -> list[Optimizer]:
        wanted = {id(param): param for param in params if param.grad is not None}
        holders = []
        for optimizer, _ in self._live():
            held = {id(param) for param in params_of(optimizer)} & wanted.keys()
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
        self._check_scaled(optimizer, record, gradients)
        if self._issued is None:
            raise RuntimeError(
                "optimizer.step() before any backward: there are no gradients yet. Call fabric.backward(loss) first"
            )
        if gradients:
            if self._is_scaled(optimizer, record):
                self._check_unchanged(optimizer, record)
                self._unscale(optimizer, record, gradients)
            returned = self._step_or_skip(optimizer, record, kwargs)
            result = returned if closure is None else result
            self._due = self._due or not record.counted
        else:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers ask for it
        self._after_step(record, name_of)
        return result

    def _after_step(self, record: _Record, name_of: NameOf) -> None:
        record.steps += 1
        record.gradients, record.stepped, record.snapshot = _Gradients.NONE, True, None
        self._rest()
        if self._due and (len(self._records) == 1 or self._all_stepped()):
            self._update_if_due()
        if self.counter.skipped_in_a_row:
            self.check_skips(name_of)

    def _step_with(
        self,
        closure: Callable[[], Any],
        optimizer: Optimizer,
        record: _Record,
        name_of: NameOf,
        kwargs: dict[str, Any],
    ) -> Any:
        """Steps an optimizer that calls the closure itself, as often as it wants; each call leaves true gradients.

        The step is skipped when the first call overflows and no parameter has moved. Else parameters lie between two
        steps, and the closure is run again with a lower scale.
        """
        results: list[Any] = []
        gradients = gradients_of(optimizer)
        if gradients and self._is_scaled(optimizer, record):  # of a backward before the step, as SAM wants
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
                self._due = True
                self._update_if_due()
                for param in params_of(optimizer):
                    if id(param) not in had:  # else the closure drops them itself
                        param.grad = None
            raise FloatingPointError(
                f"{type(optimizer).__name__}: inf or NaN in its closure's gradients {self._max_skips} times in a row, "
                f"the loss scale is {self.torch_scaler.get_scale():g}. Look for NaN in the data or the loss, lower the "
                'learning rate, or use precision="bf16-mixed", which needs no scaling'
            )

        skipped = bool(record.found_inf) and record.gradients is _Gradients.TRUE
        if not skipped:
            try:
                original(optimizer, "step")(evaluate, **kwargs)
            except _SkippedError:
                skipped = True
        self.counter.add(skipped)
        optimizer._opt_called = True  # type: ignore[attr-defined]
        self._due = self._due or not record.counted
        self._after_step(record, name_of)
        return results[0] if results else None

    def _all_stepped(self) -> bool:
        records = [record for _, record in self._live()]
        return all(record.stepped for record in [each for each in records if each.of_the_run] or records)

    def _step_or_skip(self, optimizer: Optimizer, record: _Record, kwargs: dict[str, Any]) -> Any:
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
            for optimizer, _ in self._live()
            for param in params_of(optimizer)
            if param.grad is not None and not all_finite([param.grad])
        )
        raise FloatingPointError(
            f"{self.counter.skipped_in_a_row} optimizer steps in a row were skipped, the loss scale is "
            f"{self.torch_scaler.get_scale():g}: inf or NaN in the gradients of "
            f"{_first(bad) or 'parameters whose gradients are gone by now'}. Look for NaN in the data or the loss, "
            'lower the learning rate, or use precision="bf16-mixed", which needs no scaling'
        )

    def teardown(self) -> None:
        """Unscales what was not stepped: from now on nobody knows of the scale."""
        for optimizer, record in self._live():
            if record.gradients is _Gradients.SCALED:
                _rescale(gradients_of(optimizer), self._value(), 1.0)
                record.gradients, record.snapshot = _Gradients.NONE, None
        _rescale(self._unheld.gradients(), self._value(), 1.0)
        self._unheld = Unheld(self._models)
        if self._hook is not None:
            self._hook.remove()

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
        self._follow(old)


def _rescale(gradients: list[Tensor], old: float | Tensor, new: float | Tensor) -> None:
    if gradients and (isinstance(new, Tensor) or old != new):
        multiply(gradients, new / old)


def _first(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
