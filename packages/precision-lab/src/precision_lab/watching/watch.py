"""`with precision_lab.watch(model, optimizer, every=50):` around a loop, and what it hears of it."""

from __future__ import annotations

import functools
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from precision_lab.auditing.where import Where
from precision_lab.watching.alarms import SKIPS, Alarm, Alarms
from precision_lab.watching.batch import Batch
from precision_lab.watching.calls import replaced
from precision_lab.watching.described import described, ended, unseen_of
from precision_lab.watching.forwards import follow
from precision_lab.watching.health import Health
from precision_lab.watching.kept import Kept
from precision_lab.watching.ours import Ours
from precision_lab.watching.output import Output
from precision_lab.watching.probes import Probes
from precision_lab.watching.replay import explained
from precision_lab.watching.steps import Loss, Step
from precision_lab.watching.values import Value, whole

_LATE = 8
"""Steps that wait for their values at most."""
_active: Watch | None = None


class Watch:
    """The context. `alarms` are those so far, `steps` how many steps have ended, `path` where the lines are."""

    def __init__(
        self,
        models: list[nn.Module],
        optimizers: list[Optimizer],
        every: int,
        make_output: Callable[[], Output],
        keep: bool = False,
    ) -> None:
        self.models, self.optimizers = models, optimizers
        self._optimizer = next(iter(optimizers), None)
        self.steps = 0
        self.running = False
        self.in_backward = 0
        self._every, self._make_output = every, make_output
        self._keep, self.kept_bytes = keep, 0
        self._kept: Kept | None = None
        self._judge = Alarms()
        self._probes = Probes()
        self._where = Where()
        self._exit = ExitStack()
        self._late: deque[Step] = deque()
        self._batch: Batch | None = None  # whose forward runs
        self._scaled: tuple[weakref.ref[Tensor], Tensor] | None = None  # a scaled loss, and the loss
        self._insides: dict[int, list[int]] = {}
        self._stepping: set[int] = set()  # optimizers whose step runs
        self._stepped = 0  # steps of torch's optimizers
        self._around = 0
        self._forwards = 0
        self._ours = Ours(models, optimizers)
        devices = (param.device for model in models for param in model.parameters())
        self._device = next(devices, torch.device("cpu"))

    @property
    def findings(self) -> list[dict[str, Any]]:
        """What samples gave that is worth a word, and no alarm: swallowed updates, once."""
        return self._output.findings

    @property
    def alarms(self) -> list[Alarm]:
        """Those so far."""
        return self._output.alarms

    # ---------------------------------------------------------------- begin and end

    def __enter__(self) -> Watch:
        global _active
        if _active is not None:
            raise RuntimeError(
                "watch(...): another watch runs already, and a process has one at a time. Give it all models and "
                "optimizers: watch(generator, discriminator, optimizer_g, optimizer_d)"
            )
        output = self._output = self._make_output()
        self.path = output.path
        output.run(described(self.models, self.optimizers, self._every, output.rank, output.ranks))
        self._health = Health(self)
        self._kept = Kept(self._health.names.param) if self._keep else None
        for model in self.models:
            self._exit.callback(follow(model, self._before_forward, self._after_forward))
        self._exit.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        self._exit.callback(register_optimizer_step_post_hook(self._after_step).remove)
        self._exit.enter_context(replaced(self))
        self._exit.callback(self._health.disarm)
        self._began = time.perf_counter()
        self.current = self._new_step()
        self.running, _active = True, self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        global _active
        self.running, _active = False, None
        self._exit.close()
        try:
            if self.current.optimizers:
                self._close()
            self._write_late(wait=True)
        finally:
            unseen = unseen_of(self.steps, self._forwards, self.models) + self._health.unseen
            seconds = round(time.perf_counter() - self._began, 3)
            self._output.end({"end": self.steps, "seconds": seconds, **ended(error)}, unseen)

    # ---------------------------------------------------------------- what the loop does

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or not self.running or self.in_backward:
            return
        if not module.training or not torch.is_grad_enabled():
            return
        self.begin()
        self._forwards += 1
        self._batch = self.current.batch = Batch(args, kwargs, self._device, module)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._batch is not None and self._batch.model is module:
            self._batch.follow(output, self._insides)
            self._batch = None
        self._health.after_forward(module, args, output)

    def begin(self) -> None:
        """Called where a training forward or a backward begins: after an optimizer's step it is of the next one."""
        if self.current.optimizers and not self._stepping:
            self._close()

    def before_backward(self, loss: Tensor | None) -> None:
        """Called with what backward is called on."""
        self.begin()
        batch = self.current.batch
        if batch is not None:
            batch.loss = loss
        known = self._scaled is not None and self._scaled[0]() is loss
        value = None if loss is None else whole(self._scaled[1] if self._scaled and known else loss.detach())
        if value is not None:
            self.current.waiting.append(Loss(Value(value), self._where.line(3), batch))
            self._look()
        if batch is not None:
            batch.loss = None  # its graph has hooks that hold the batch

    def scaled(self, scaler: Any, outputs: Any, result: Any) -> None:
        """Called where a loss was scaled."""
        self.begin()
        step = self.current
        step.is_scaled = True
        scale = getattr(scaler, "_scale", None)  # torch's name for it: `get_scale` waits for the device
        if scale is not None:
            step.scale = Value(scale)
        if isinstance(outputs, Tensor) and isinstance(result, Tensor):
            self._scaled = weakref.ref(result), outputs.detach()

    def clipped(self, norm: Tensor) -> None:
        """Called with a norm that the loop has computed."""
        value = whole(norm.detach())
        if value is not None and not self.current.optimizers:
            self.current.norms.append(Value(value))
            self._look()

    def around_step(self, optimizer: Optimizer, run: Callable[[], Any], scaled: bool) -> Any:
        """Runs what steps an optimizer, unless the gradients are not finite."""
        before = self._stepped
        self._around += 1
        try:
            result = run()
        finally:
            self._around -= 1
        if scaled and self._stepped == before and not self._around:
            self._begin_step(optimizer)
            self.current.skips.append(Value(1.0))
            self._end_step(optimizer)
        return result

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Called by torch before each step of an optimizer; returns its arguments where the closure is another one."""
        if not self.running or optimizer not in self._ours:
            return None
        self._stepped += 1
        self._begin_step(optimizer)
        found = kwargs.get("found_inf", getattr(optimizer, "found_inf", None))
        if isinstance(found, Tensor):
            self.current.skips.append(Value(found))
        self._stepping.add(id(optimizer))
        given = (*args, *kwargs.values())
        closure = next((each for each in given if callable(each) and each is not optimizer), None)
        if closure is None:
            self._look_at_gradients(optimizer)
            return None
        around = self._around_closure(optimizer, closure)
        changed = {key: around if each is closure else each for key, each in kwargs.items()}
        return tuple(around if each is closure else each for each in args), changed

    def _around_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Returns a closure after which, the first time, the gradients are those of the step."""
        first = True

        @functools.wraps(closure)
        def around() -> Any:
            nonlocal first
            result = closure()
            if first and self.running:
                self._look_at_gradients(optimizer)
                self.current.changed = True
            first = False
            return result

        return around

    def _look_at_gradients(self, optimizer: Optimizer) -> None:
        """Called where an optimizer is about to use its gradients."""
        if self.current.sampled:
            self._health.before_step(optimizer, self.current)
        elif not self.current.norms and not self.current.is_scaled:
            largest = self._probes.largest(optimizer)
            if largest is not None:
                self.current.probes.append(Value(largest))
        self._look(wait=self._kept is not None)  # before the copies are those of this step
        if self._kept is not None:
            self._kept.take(optimizer, self.current.batch, self.current.factor)
            self._tell_bytes(self._kept.bytes)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.running and id(optimizer) in self._stepping:
            if self.current.sampled:
                self._health.after_step(optimizer)
            self._end_step(optimizer)

    def _begin_step(self, optimizer: Optimizer) -> None:
        self._stepping.discard(id(optimizer))  # left there by a step that raised
        if id(optimizer) in self.current.optimizers and not self._stepping:
            self._close()
        self.current.optimizers.append(id(optimizer))

    def _end_step(self, optimizer: Optimizer) -> None:
        self._stepping.discard(id(optimizer))
        self.current.changed = True
        self._health.disarm()
        if self._is_sampled(self.current.number + 1):
            self._health.arm()

    # ---------------------------------------------------------------- steps end

    def _is_sampled(self, number: int) -> bool:
        return number % self._every == 0  # not the first: what compiles there would do so with the hooks

    def _new_step(self) -> Step:
        step = Step(self.steps + 1, self._is_sampled(self.steps + 1))
        if step.sampled:
            self._health.arm()
        return step

    def _close(self) -> None:
        step = self.current
        step.seconds = time.perf_counter() - step.started
        self.steps = step.number
        if step.sampled:
            self._health.close(step)
        self._late.append(step)
        self.current = self._new_step()
        self._write_late()

    def _look(self, wait: bool = False) -> None:
        for step in (*self._late, self.current):
            self._tell(step, step.look(self._judge, wait))

    def _tell_bytes(self, count: int) -> None:
        if count > self.kept_bytes:  # the state is there from the second step on
            self.kept_bytes = count
            self._output.keep({"keep": count, "before_step": self.current.number})

    def _write_late(self, wait: bool = False) -> None:
        while self._late and (wait or self._late[0].ready or len(self._late) > _LATE):
            step = self._late[0]
            self._tell(step, step.end(self._judge))
            self._late.popleft()
            self._output.step(step.as_dict())
        for line in self._health.read(wait):
            if "finding" in line:
                self._output.finding(line)
            else:
                self._output.sample(line)

    def _tell(self, step: Step, found: list[tuple[Alarm, Batch | None]]) -> None:
        for alarm, batch in found:
            alarm.before_step = (step is self.current and not step.changed) or alarm.kind == SKIPS
            was, self.running = self.running, False  # what a replay calls is none of the loop's
            try:
                alarm.explanation, alarm.unexplained = explained(
                    alarm.kind, batch, step.factor, self._optimizer, self._output.ranks, self._kept
                )
            finally:
                self.running = was
            self._output.alarm(alarm)
