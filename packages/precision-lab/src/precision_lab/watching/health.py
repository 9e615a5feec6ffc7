"""Every so many steps: what each module gives and gets back, the gradients, and updates that round to nothing."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from precision_lab.auditing.ledger import short
from precision_lab.auditing.names import Names, clean
from precision_lab.watching.sampled import Sampled
from precision_lab.watching.unchanged import Unchanged
from precision_lab.watching.values import Value

if TYPE_CHECKING:
    from precision_lab.watching.steps import Step
    from precision_lab.watching.watch import Watch


class Health:
    """Hooks on all modules, for one step; what they saw is read when it has come from the device."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.names = Names()
        for model in watch.models:
            self.names.add(model)
        self._hooks: list[RemovableHandle] = []
        self._armed = False
        self._sampled = Sampled()
        self._updates: dict[int, Unchanged] = {}
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # tensors that a module inside gave, and versions
        self._done: deque[Sampled] = deque()
        self.unseen: list[str] = []
        self.swallowed: dict[str, Any] | None = None  # told once

    # ---------------------------------------------------------------- hooks

    def arm(self) -> None:
        """Puts hooks on the modules. Not inside of compiled ones, which would not run them."""
        if self._armed:
            return
        self._armed = True
        for model in self._watch.models:
            for module in self._open(model):
                if module is not model:  # whose own hook calls `after_forward`: compiled code may not see it change
                    self._hooks.append(module.register_forward_hook(self.after_forward))

    def disarm(self) -> None:
        """Takes them off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._armed = False
        self._seen.clear()

    def _open(self, module: nn.Module, path: str = "") -> list[nn.Module]:
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            inside = clean(path) or type(module).__name__
            self.note_unseen(f"inside of {inside}: it is compiled; its own output and gradients of parameters are seen")
            return [module] if module._compiled_call_impl is None or not path else []
        found = [module] if not isinstance(module, torch.jit.ScriptModule) else []
        for name, child in module.named_children():
            found += self._open(child, f"{path}.{name}")
        return found

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Looks at what a module gave."""
        if torch.compiler.is_compiling() or not self._armed:
            return
        if not self._watch.running or not torch.is_grad_enabled():
            return
        if not any(model.training for model in self._watch.models):
            return
        if not self._watch.in_backward:
            self._watch.begin()
        name = self.names.path(module)
        tensor = _first(output)
        if tensor is None or self._sampled.has(name, "output"):
            return
        seen = self._seen.get(id(tensor))
        if seen is not None and seen[0]() is tensor and seen[1] == tensor._version:
            return
        self._seen[id(tensor)] = weakref.ref(tensor), tensor._version
        self._sampled.take(name, "output", tensor)
        if tensor.requires_grad:
            tensor.register_hook(functools.partial(self._gradient, name, self._sampled))

    def _gradient(self, name: str, sampled: Sampled, gradient: Tensor) -> None:
        if sampled is self._sampled and not sampled.has(name, "gradient"):
            sampled.take(name, "gradient", gradient)

    # ---------------------------------------------------------------- the optimizer's step

    def before_step(self, optimizer: Optimizer, step: Step) -> None:
        """Looks at the gradients that the optimizer is about to use."""
        gradients: list[Tensor] = []
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.layout is torch.strided:
                    gradients.append(param.grad)
                    name = self.names.param(param)
                    if name is not None:
                        self._sampled.take(name, "parameter", param.grad)
        if gradients and not step.norms and all(type(each) is Tensor for each in gradients):
            norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
            scale = getattr(optimizer, "grad_scale", None)
            step.norms.append(Value(norm if scale is None else norm / scale))
        self._updates[id(optimizer)] = Unchanged(optimizer, self.names.param, details=self.swallowed is None)

    def after_step(self, optimizer: Optimizer) -> None:
        """Looks at what it has changed."""
        taken = self._updates.pop(id(optimizer), None)
        if taken is not None:
            self._sampled.updates(*taken.counts(), taken.before)

    # ---------------------------------------------------------------- what was seen

    def close(self, step: Step) -> None:
        """Ends the sample of a step."""
        self.disarm()
        autocast = step.batch.autocast if step.batch is not None else {}
        self._sampled.close(step.number, {device: short(dtype) for device, dtype in autocast.items() if dtype})
        self._done.append(self._sampled)
        self._sampled = Sampled()

    def read(self, wait: bool) -> list[dict[str, Any]]:
        """Returns the samples that have come, as lines, and what was found in them."""
        found = []
        while self._done and (wait or self._done[0].ready):
            done = self._done.popleft()
            found.append(done.as_dict())
            if self.swallowed is None and done.swallowed is not None:
                self.swallowed = done.swallowed
                found.append(done.swallowed)
        return found

    def note_unseen(self, text: str) -> None:
        """Adds what could not be seen."""
        if text not in self.unseen:
            self.unseen.append(text)


def _first(output: Any) -> Tensor | None:
    """Returns the first tensor of floating point in what a module gave."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.layout is torch.strided and output.numel() else None
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (list, tuple)) else ()
    return next((found for found in map(_first, values) if found is not None), None)
