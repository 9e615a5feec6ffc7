"""Records: what is known of each optimizer's gradients, and the checks that need no more than that.

NONE      no loss was scaled since its last step; gradients in p.grad are unscaled
SCALED    one was; gradients in p.grad carry the scale
UNSCALED  they were unscaled since, by `unscale` or `clip`, and not yet stepped
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import LBFGS, Optimizer

from precision_core.policy.messages import listed
from precision_core.scaling.gradients import multiply, params_of
from precision_core.scaling.guard import Snapshot
from precision_core.scaling.scaler import NameOf

_FIRST_STEPS = 3
"""In this many first steps a few values of sharded gradients are compared: torch counts no version for some changes."""


class Gradients(enum.Enum):
    """Whether an optimizer's gradients carry the scale."""

    NONE = enum.auto()
    SCALED = enum.auto()
    UNSCALED = enum.auto()


class Ways(NamedTuple):
    """Ways out, for the messages about gradients that carry the scale."""

    before_a_change: str
    before_a_step: str
    before_an_update: str


UNSCALE_FIRST = Ways(
    "Call fabric.unscale_gradients(optimizer) before anything reads or changes p.grad, or clip with "
    "fabric.clip_gradients(model, optimizer, max_norm=...)",
    "call its step, or fabric.unscale_gradients on it before {} steps",
    "call fabric.unscale_gradients(optimizer) before it",
)


class Record:
    """What is known of one optimizer's gradients."""

    def __init__(self, reference: weakref.ref[Optimizer]) -> None:
        self.reference = reference
        self.registered = False  # by `Scaler.register`, before its first clip or step
        self.gradients = Gradients.NONE
        self.stepped = False  # since the last scaling
        self.found_inf: bool | Tensor = False  # in UNSCALED gradients; a tensor with `avoid_sync`
        self.counted = True  # found_inf has gone into an update of the scale
        self.skipped: bool | Tensor = False  # the last step; a tensor where only the device knows
        self.stepping = False  # by our own step, which looks at found_inf
        self.steps = 0
        self.snapshot: Snapshot | None = None  # of gradients that are SCALED, where the end of backward was seen

    def look(self, optimizer: Optimizer) -> None:
        """Takes a snapshot of gradients that carry the scale."""
        self.snapshot = Snapshot(optimizer, shards=self.steps < _FIRST_STEPS)

    def may_have_overflowed(self) -> bool:
        """Whether unscaled gradients have inf or NaN, as far as is known without waiting for the device."""
        return self.gradients is Gradients.UNSCALED and self.found_inf is not False

    def is_unchanged(self, optimizer: Optimizer) -> bool:
        """Whether there is a snapshot, and the gradients are as it saw them."""
        return self.snapshot is not None and not self.snapshot.changed(optimizer)


class Records:
    """The records of all known optimizers, none of which it keeps alive."""

    def __init__(
        self, torch_scaler: GradScaler, name_of: NameOf, *, avoid_sync: bool, ways: Ways = UNSCALE_FIRST
    ) -> None:
        self.ways = ways
        self._torch_scaler = torch_scaler
        self._name_of = name_of
        self._avoid_sync = avoid_sync
        self._by_id: dict[int, Record] = {}
        self.added = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, optimizer: Optimizer) -> Record | None:
        """Returns the record of `optimizer`; None: it is not known."""
        return self._by_id.get(id(optimizer))

    def live(self) -> list[tuple[Optimizer, Record]]:
        """Returns the optimizers that are still there, each with its record."""
        pairs = [(record.reference(), record) for record in list(self._by_id.values())]
        return [(optimizer, record) for optimizer, record in pairs if optimizer is not None]

    def add(self, optimizer: Optimizer) -> Record:
        """Returns a new record.

        Raises:
            ValueError: LBFGS, or a parameter that another optimizer holds too.
        """
        self._check(optimizer)
        key, by_id = id(optimizer), self._by_id
        record = by_id[key] = Record(weakref.ref(optimizer, lambda _: by_id.pop(key, None)))
        self.added += 1
        return record

    def _check(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS evaluates the loss several times a step and cannot run with a scaled loss: "
                'use another optimizer, or a mode that does not scale such as precision="bf16-mixed"'
                " [closure-optimizer]"
            )
        ours = {id(param) for param in params_of(optimizer)}
        for other, _ in self.live():
            if any(id(param) in ours for param in params_of(other)):
                raise ValueError(
                    f"{type(optimizer).__name__} and {type(other).__name__} hold the same parameter: under "
                    "a scaled loss gradients are unscaled per optimizer, so each parameter may be in one optimizer only"
                    " [shared-parameter]"
                )

    def any_scaled(self) -> bool:
        """Whether gradients of any carry the scale, as far as the records say."""
        return any(record.gradients is Gradients.SCALED for record in self._by_id.values())

    def any_overflowed(self) -> bool:
        """Whether unscaled gradients of any have inf or NaN, or may have where only the device knows."""
        return any(record.may_have_overflowed() for record in self._by_id.values())

    def all_stepped(self) -> bool:
        """Whether every optimizer of the run has stepped since the last scaling."""
        records = [record for _, record in self.live()]
        return all(record.stepped for record in [each for each in records if each.registered] or records)

    # ---------------------------------------------------------------- of one optimizer

    def is_scaled(self, optimizer: Optimizer, record: Record) -> bool:
        """Whether its gradients carry the scale; not where the user has called `unscale_` of torch's scaler."""
        if record.gradients is Gradients.SCALED:
            state = self._torch_scaler._per_optimizer_states.get(id(optimizer))
            if state is not None and state["stage"] is OptState.UNSCALED:
                self.now_unscaled(optimizer, record)
        return record.gradients is Gradients.SCALED

    def carry_scale(self, optimizer: Optimizer, record: Record, gradients: Sequence[Tensor] = ()) -> bool:
        """Whether its gradients carry the scale, and may be unscaled.

        Raises:
            RuntimeError: `gradients` come from no loss that was scaled, or were changed since their backward.
        """
        if record.gradients is Gradients.NONE and gradients:
            raise RuntimeError(
                f"the gradients of {type(optimizer).__name__} come from no scaled loss: nothing was scaled since its "
                "last step. Call fabric.backward(loss) instead of loss.backward(); in a loop without Fabric, "
                "precision.pre_backward(loss, model).backward() [unscaled-loss]"
            )
        if not self.is_scaled(optimizer, record):
            return False
        changed = record.snapshot.changed(optimizer) if record.snapshot is not None else ()
        if changed:
            raise RuntimeError(
                f"the gradients of {listed(map(self._name_of, changed), 5)} were changed after fabric.backward, while "
                f"they carried the loss scale ({self._torch_scaler.get_scale():g}). {self.ways.before_a_change}; "
                f"zero_grad() of {type(optimizer).__name__} drops them [changed-gradients]"
            )
        return True

    def now_unscaled(self, optimizer: Optimizer, record: Record, flag: Tensor | None = None) -> None:
        """Records what the check for inf and NaN found: `flag`, or what torch's scaler knows where that is None."""
        if flag is not None:
            state = self._torch_scaler._per_optimizer_states[id(optimizer)]
            state["stage"], state["found_inf_per_device"] = OptState.UNSCALED, {flag.device: flag}
        flags = [flag] if flag is not None else list(self._torch_scaler._found_inf_per_device(optimizer).values())
        if self._avoid_sync and flags:
            record.found_inf = torch.stack([each.to(flags[0].device) for each in flags]).sum()
        else:
            record.found_inf = sum([each.item() for each in flags]) != 0
        record.gradients, record.counted, record.snapshot = Gradients.UNSCALED, not flags, None


def rescale(gradients: list[Tensor], old: float | Tensor, new: float | Tensor) -> None:
    """Brings gradients that carry the scale `old` to `new`, in place."""
    if gradients and (isinstance(new, Tensor) or old != new):
        multiply(gradients, new / old)
