"""Watches a loop: modules, operations, optimizers and the calls that matter, by torch's own hooks, within a `with`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from precision_lab.auditing.asked import read_alive, read_calling
from precision_lab.auditing.calls import watch_calls
from precision_lab.auditing.gradients import Gradients, storage
from precision_lab.auditing.graph import saved_activations
from precision_lab.auditing.hand_steps import HandSteps
from precision_lab.auditing.holds import HALVES
from precision_lab.auditing.hooks import Hooks
from precision_lab.auditing.names import Names
from precision_lab.auditing.ops import Ops
from precision_lab.auditing.optimizers import Steps
from precision_lab.auditing.record import Context, Event, Record
from precision_lab.auditing.stored import read_stored
from precision_lab.auditing.switches import switches
from precision_lab.auditing.where import Line, Where

_DRIVING = ("backward", "step", "scaler_step")
"""Calls by which a library runs the loop; a model's own code, of whatever library, makes others."""


class Recorder:
    """Context in which a training loop is observed; `record` then has what was seen.

    The loop computes what it computes without it, bit for bit. `on_step` is called where a training step has ended and
    the next one is about to begin: what it raises ends the loop.
    """

    def __init__(self, on_step: Callable[[int], None] | None = None) -> None:
        self.record = Record()
        self.names = Names()
        self.where = Where()
        self.running = False
        self.stack: list[str] = []
        self.root = Event("forward", None, "", 0)  # the outermost forward that runs, or ran last
        self.autocast: list[tuple[str, torch.dtype | None]] = []  # contexts that are open, innermost last
        self.contexts: list[Context] = []  # the same, and whether enabled=True was asked for
        self._looked = False  # for hosts that are alive
        self.in_step = 0
        self.in_closure = 0  # of a step: the loop's own code, forward and backward
        self.in_backward = 0
        self.in_cast = False  # in a module's `to`, of which each child's is a part
        self.checkpointed = False
        self.optimizers: dict[int, Optimizer] = {}
        self.on_step = on_step
        self.ops = Ops(self)
        self._exit = ExitStack()
        self.counted = Steps()
        self.hand_steps = HandSteps(self)
        self.gradients = Gradients(self.params)
        self.scaled: dict[int, tuple[int, float]] = {}  # number of an autograd node -> scaler that made it, scale
        self.watch_late: Callable[[], None] = lambda: None
        self.in_save = 0
        self.scaler_steps: list[int] = []  # scalers whose step runs
        self.backward_line: Line | None = None
        self.backward_dtypes: set[torch.dtype] = set()  # of products in the backward that runs
        self.asked = WeakKeyDictionary[Any, bool]()  # autocast contexts -> whether enabled=True was asked for
        self.cache = 0  # number of the weight cache of autocast that is in use
        self.cast_to_half: dict[int, Line] = {}  # memory of a result -> where it was cast to half, outside of models
        self.backwards: dict[int, int] = {}  # id of a parameter -> backwards since its last step
        self._kept: list[Any] = []  # whose id stands for them in what was seen

    # ---------------------------------------------------------------- begin and end

    def __enter__(self) -> Recorder:
        Hooks(self).register(self._exit)
        self._compiled = _compiled_frames()
        self._exit.enter_context(watch_calls(self))
        self._exit.enter_context(self.ops)
        self.running = True
        return self

    def __exit__(self, *error: Any) -> None:
        self.running = False
        self._exit.close()
        self._finish()

    def _finish(self) -> None:
        record = self.record
        record.ops = self.ops.rows
        record.steps = self.steps
        self.names.refresh()
        self.look_for_hosts()
        record.libraries += {each.library: None for each in record.asked if each.library not in record.libraries}
        record.modules = {
            self.names.path(module): type(module).__name__ for root in self.names.roots for module in root.modules()
        }
        record.stored += read_stored(self.names, list(self.optimizers.values()))
        record.backends = switches()
        record.rate_line = self.where.rate_line()
        record.params = {id(param): self.names.param(param) or "" for param in self.params()}
        for param in self.params():
            if param.dtype in HALVES and (line := self.cast_to_half.get(storage(param))) is not None:
                record.cast_lines[record.params[id(param)]] = line
        for optimizer in self.optimizers.values():
            for of, state in optimizer.state.items():
                for key, value in state.items() if isinstance(state, dict) else ():
                    if isinstance(value, Tensor) and (line := self.cast_to_half.get(storage(value))) is not None:
                        record.cast_lines[f"{self.names.param(of)}.{key}"] = line
        record.events = [event for event in record.events if event.kind not in ("gradients", "assigned") or event.ids]
        if not record.of("forward"):
            self.note_unseen(
                "no module was called in this process. Where the script starts processes of its own, "
                "run `torchrun --nproc-per-node N -m precision_lab audit SCRIPT` with a script that does not"
            )
        if _compiled_frames() > self._compiled:
            self.note_unseen("torch.compile: of what it generated only calls of vendors' kernels were seen")
        if self.checkpointed:
            self.note_unseen("saved activations: hooks of the script (activation checkpoints) decide what is saved")

    # ---------------------------------------------------------------- what the parts ask and tell

    @property
    def steps(self) -> int:
        """Training steps that have begun: of the optimizer that stepped least often; without one, of those by hand."""
        return self.counted.all if self.counted.any else self.hand_steps.count

    @property
    def in_update(self) -> bool:
        """Whether an optimizer's own code runs."""
        return self.in_step > self.in_closure

    @staticmethod
    def quiet() -> AbstractContextManager[None]:
        """Context for what the observers themselves compute, which is not to be seen."""
        return _disable_current_modes()

    def note(self, kind: str, line: Line | None = None, **data: Any) -> Event:
        """Adds a call to what was seen."""
        library = self.where.library(2)
        event = Event(kind, line or self.where.line(2), library, self.steps, data)
        self.record.events.append(event)
        if kind in _DRIVING and library and library not in self.record.libraries:
            self.record.libraries.append(library)
        return event

    def note_rounded(self, line: Line | None, **data: Any) -> None:
        """Adds whole numbers that were rounded, one for each line and module."""
        for event in self.record.integers:
            if (event.line, event.module) == (line, data["module"]):
                event.data["largest"] = max(event.largest, data["largest"])
                return
        self.record.integers.append(Event("rounded", line, "", self.steps, data))

    def note_unseen(self, text: str) -> None:
        """Adds what could not be observed."""
        if text not in self.record.unseen:
            self.record.unseen.append(text)

    def keep(self, value: Any) -> int:
        """Returns an id by which events speak of an object, which lives as long as the recorder."""
        if not any(each is value for each in self._kept):
            self._kept.append(value)
        return id(value)

    def autocast_dtype(self, device: str) -> torch.dtype | None:
        """The dtype of the innermost open autocast of the device, None outside of one. torch hides it in operations."""
        return next((dtype for of, dtype in reversed(self.autocast) if of == device), None)

    def open_cache(self) -> int | None:
        """The number of autocast's weight cache that is in use: it lives as long as the outermost context."""
        return self.cache if self.autocast and torch.is_autocast_cache_enabled() else None

    def module_path(self) -> str:
        """The module whose forward runs."""
        return self.stack[-1] if self.stack else ""

    def is_trained(self, tensor: Tensor) -> bool:
        """Whether the tensor is a parameter that trains."""
        return isinstance(tensor, nn.Parameter) and tensor.requires_grad

    def is_stored(self, tensor: Tensor) -> bool:
        """Whether it is a parameter or a buffer of a model, or a view of one."""
        base = tensor if tensor._base is None else tensor._base
        return isinstance(base, nn.Parameter) or any(
            base is buffer for root in self.names.roots for buffer in root.buffers()
        )

    def params(self) -> list[nn.Parameter]:
        """All parameters of models and optimizers that were seen."""
        found = {id(param): param for root in self.names.roots for param in root.parameters()}
        for optimizer in self.optimizers.values():
            found.update({id(param): param for group in optimizer.param_groups for param in group["params"]})
        return list(found.values())

    def before_backward(self, roots: list[Tensor]) -> None:
        """Called before the outermost backward."""
        self.record.asked = self.record.asked or read_calling(self.where)
        if self.steps == 0 and not self.checkpointed and not self.record.saved:
            self.record.saved = saved_activations(roots, self.ops.origin, {storage(each) for each in self.params()})
        self.hand_steps.before_backward()
        self.gradients.settle()
        self.gradients.before_backward()
        self.backward_dtypes = set()

    def look_for_hosts(self) -> None:
        """Called once a library was seen to take part: its host may call no backward, and be found all the same."""
        libraries = {event.library for event in self.record.events} - {""}
        if libraries and not self._looked and not self.record.asked:
            self._looked = True
            self.record.asked = read_alive(self.where, libraries)

    def after_backward(self, event: Event | None) -> None:
        """Called after the outermost backward: gradients are other ones now."""
        written, fresh = self.gradients.after_backward()
        if event is not None:
            event.data.update(ids=written, fresh=fresh, products=sorted(self.backward_dtypes, key=str))
        for param in self.params():
            if param.grad is not None:
                self.backwards[id(param)] = self.backwards.get(id(param), 0) + 1

    def attempted(self, optimizer: Optimizer) -> None:
        """Called where a step of the optimizer begins, or was skipped by a scaler."""
        if self.on_step is not None and self.counted.of(optimizer):
            self.on_step(self.steps)
        self.optimizers[id(optimizer)] = optimizer
        self.counted.begin(optimizer)


def _compiled_frames() -> int:
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters["frames"]["ok"]) if utils is not None else 0
