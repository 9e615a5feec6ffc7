"""Watch: steps by unknown optimizers, and gradients that no known one holds, while gradients carry the loss scale."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from precision_core.policy.messages import listed
from precision_core.scaling.gradients import all_finite, gradients_of, params_of
from precision_core.scaling.guard import StepHook, Unheld, stepping, wraps
from precision_core.scaling.records import Gradients, Record, Records
from precision_core.scaling.scaler import NameOf

_FIRST_LOSSES = 16
"""Of this many first losses, and as many again when an optimizer or a model has come, the leaves are looked for.

A loop's losses are alike, or a few kinds that take turns; a walk through a graph takes about a microsecond a node.
"""


class Watch:
    """Raises before a step on gradients that carry the scale; warns of updates that it sees only afterwards."""

    def __init__(
        self,
        records: Records,
        models: Collection[nn.Module],
        torch_scaler: GradScaler,
        name_of: NameOf,
    ) -> None:
        self._records = records
        self._models = models
        self._torch_scaler = torch_scaler
        self._name_of = name_of
        self._hook: StepHook[Watch] | None = None
        self.unheld = Unheld(models)
        self._found: tuple[int, int, int] | None = None  # optimizers ever added and alive, and models, at its last look
        self._losses = 0  # whose leaves were looked for
        self._warned = False

    def begin(self, loss: Tensor, live: list[tuple[Optimizer, Record]]) -> None:
        """Checks every optimizer step of the process from now on, until no gradients carry the scale."""
        self._find_unheld(live)
        if self._losses < _FIRST_LOSSES:
            self._losses += 1
            self.unheld.find_leaves(loss, _held(live))
        if not self._warned:
            self._check_left(live)
        if self.unheld and self.unheld.trains():  # a closure runs after the hook of the step that calls it
            for optimizer in stepping():
                if self._records.get(optimizer) is None:
                    self._check_foreign(optimizer, self.unheld.in_run)
        if self._hook is None:
            self._hook = StepHook(self, Watch._before_step)
        self._hook.add()

    def _find_unheld(self, live: list[tuple[Optimizer, Record]]) -> None:
        found = (self._records.added, len(live), len(self._models))
        if self._found != found:
            self._found, self._losses = found, 0
            self.unheld.find(_held(live))

    def rest(self) -> None:
        """Stops watching where no gradients are known to carry the scale, or to have overflowed."""
        if self._hook is None or self._records.any_scaled() or self._records.any_overflowed():
            return
        if self._found is None or self._found[0] != self._records.added:  # one has come, which may hold them now
            self._find_unheld(self._records.live())
        if not self.unheld or not self.unheld.any_scaled():
            self._hook.remove()

    def end(self) -> None:
        """Stops watching, whatever gradients carry the scale."""
        self.unheld = Unheld(self._models)
        if self._hook is not None:
            self._hook.remove()

    def _before_step(self, optimizer: Optimizer) -> None:
        """Raises `RuntimeError` where `optimizer`, known or not, is about to step gradients that carry the scale.

        Or that were unscaled and are inf or NaN: our own step skips those, no other does.
        """
        record = self._records.get(optimizer)
        if record is None:
            self._check_foreign(optimizer, self.unheld.carrying)
        elif self._records.is_scaled(optimizer, record) and gradients_of(optimizer):
            raise RuntimeError(
                f"{type(optimizer).__name__} was about to step gradients that carry the loss scale, by a call that "
                "went past what fabric.setup(model, optimizer) put on it: call optimizer.step() of the very object, or "
                "without Fabric precision.optimizer_step(optimizer, model, None) [scaled-gradients]"
            )
        else:
            self._check_overflow(optimizer, optimizer, record)

    def _check_overflow(self, optimizer: Optimizer, holder: Optimizer, record: Record) -> None:
        """Raises `RuntimeError` where `optimizer` is about to step gradients of `holder` that are inf or NaN.

        Waits for the device only where the check for them found some, or only the device knows.
        """
        if record.stepping or not record.may_have_overflowed():
            return
        held = {id(param) for param in params_of(holder)}
        shared = [param for param in params_of(optimizer) if id(param) in held and param.grad is not None]
        if all_finite([param.grad for param in shared if param.grad is not None]):  # mended by the user, or dropped
            return
        raise RuntimeError(
            f"{type(optimizer).__name__} was about to step gradients that overflowed (inf or NaN), and by a plain call "
            "of its step nothing skips that: give it to fabric.setup(model, optimizer), or to "
            "fabric.setup_optimizers(optimizer), whose step skips them and lowers the scale; without Fabric call "
            "precision.optimizer_step(optimizer, model, None) [scaled-gradients]"
        )

    def _check_foreign(
        self, optimizer: Optimizer, find: Callable[[Iterable[nn.Parameter]], nn.Parameter | None]
    ) -> None:
        """Raises `RuntimeError` for an unknown `optimizer` whose parameters have gradients that carry the scale.

        Those are held by a known optimizer too, or `find` returns one among the others.
        """
        holders = {
            id(param): (holder, record) for holder, record in self._records.live() for param in params_of(holder)
        }
        params = list(params_of(optimizer))
        for param in params:
            holder, record = holders.get(id(param), (None, None))
            if holder is None or record is None or param.grad is None or wraps(optimizer, holder):
                continue
            if self._records.is_scaled(holder, record):
                raise RuntimeError(
                    f"{type(optimizer).__name__} was about to step gradients that carry the loss scale. "
                    f"{type(holder).__name__}, which fabric.setup was given, holds the same parameters: "
                    f"{self._records.ways.before_a_step.format(type(optimizer).__name__)} [scaled-gradients]"
                )
            self._check_overflow(optimizer, holder, record)
        scaled = find(param for param in params if id(param) not in holders)
        if scaled is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__} was not set up, and was about to step gradients that carry the loss "
                f"scale, such as that of {self._name_of(scaled)}: give it to fabric.setup(model, optimizer), or to "
                "fabric.setup_optimizers(optimizer) where it is made later; without Fabric call "
                "precision.optimizer_step(optimizer, model, None) [scaled-gradients]"
            )

    def _check_left(self, live: list[tuple[Optimizer, Record]]) -> None:
        """Warns once of updates that no hook saw: changed parameters, or scaled gradients that are still there."""
        updated, unstepped = self.unheld.left() if self.unheld else ([], [])
        for optimizer, record in live:
            if record.gradients is Gradients.SCALED and record.snapshot is not None:
                updated += record.snapshot.updated(optimizer)
        if not updated and not unstepped:
            return
        self._warned = True
        names = listed(map(self._name_of, updated or unstepped), 5)
        what = (
            f"{names} changed while their gradients carried the loss scale, and no step that the "
            "precision knows of did that. An update by hand, or a method such as first_step, reads gradients "
            f"that are {self._torch_scaler.get_scale():g} times too large: {self._records.ways.before_an_update}"
            if updated
            else f"{names} have gradients that carry the loss scale, and that nobody stepped "
            "or dropped: no optimizer that was set up holds them. Give it to fabric.setup(model, optimizer) or "
            "fabric.setup_optimizers(optimizer), or call requires_grad_(False) on what does not train"
        )
        warnings.warn(what, stacklevel=7)


def _held(live: list[tuple[Optimizer, Record]]) -> set[int]:
    return {id(param) for optimizer, _ in live for param in params_of(optimizer)}
