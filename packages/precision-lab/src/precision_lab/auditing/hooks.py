"""Hooks of torch on every module's forward and every optimizer's step: which model runs, what a step takes."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from precision_lab.auditing.models import read_model
from precision_lab.auditing.optimizers import has_closure, ids_of, note_step, note_stepped
from precision_lab.auditing.sample import Sample

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder


class Hooks:
    """What is noted where a module's forward or an optimizer's step begins and ends."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._samples: dict[int, Sample] = {}

    def register(self, until: ExitStack) -> None:
        """Registers the hooks, for all modules and optimizers, until the stack is left."""
        for hook in (
            register_module_forward_pre_hook(self._before_forward),
            register_module_forward_hook(self._after_forward, always_call=True),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ):
            until.callback(hook.remove)

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        recorder = self._recorder
        if torch.compiler.is_compiling() or not recorder.running:
            return
        if not recorder.stack:
            within = recorder.in_backward or recorder.in_step  # a recomputation, a closure
            if module.training and torch.is_grad_enabled() and recorder.on_step is not None and not within:
                recorder.on_step(recorder.steps)
            if not recorder.names.knows(module):
                recorder.names.add(recorder.where.owner(module, 2))
        elif not recorder.names.knows(module):
            recorder.names.refresh()
        path = recorder.names.path(module)
        if not recorder.stack:
            self._note_root(module, path, inputs)
            read_model(recorder.record, recorder.names, recorder.names.root(module))
            recorder.ops.flow.begin(recorder.names.roots)
        recorder.stack.append(path)

    def _note_root(self, module: nn.Module, path: str, inputs: Any) -> None:
        recorder = self._recorder
        device = next((param.device.type for param in module.parameters()), None)
        if device is not None and device not in recorder.record.devices:
            recorder.record.devices.append(device)
        types = {"cpu", *recorder.record.devices}
        recorder.root = recorder.note(
            "forward",
            root=path,
            params=sum(1 for _ in module.parameters()),
            autocast={each: torch.get_autocast_dtype(each) for each in types if torch.is_autocast_enabled(each)},
            grad=torch.is_grad_enabled(),
            training=module.training,
            recompute=bool(recorder.in_backward),
            device=device,
            contexts=list(recorder.contexts),
            within={},
            cache=recorder.open_cache(),
            ids=[id(param) for param in module.parameters() if param.requires_grad],
            inputs=[each.dtype for each in torch.utils._pytree.tree_leaves(inputs) if isinstance(each, Tensor)],
            outputs=[],
        )

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        recorder = self._recorder
        if torch.compiler.is_compiling() or not recorder.running or not recorder.stack:
            return
        recorder.stack.pop()
        if not recorder.stack:
            leaves = torch.utils._pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
            recorder.root.data["outputs"] = [each.dtype for each in leaves if isinstance(each, Tensor)]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        recorder = self._recorder
        if not recorder.running:
            return None
        recorder.attempted(optimizer)
        recorder.in_step += 1
        recorder.gradients.settle()
        recorder.watch_late()
        note_step(recorder, optimizer, closure=has_closure(args, kwargs))
        recorder.look_for_hosts()
        for param in recorder.params():
            name = recorder.names.param(param)
            count = recorder.backwards.get(id(param), 0)
            if name is not None and param.grad is not None:
                recorder.record.micro_batches[name] = max(recorder.record.micro_batches.get(name, 0), count)
        with recorder.quiet():
            self._samples[id(optimizer)] = Sample(optimizer, recorder.names, recorder.record)
        if not has_closure(args, kwargs):
            return None
        within = {key: self._closure(each) if callable(each) else each for key, each in kwargs.items()}
        return tuple(self._closure(each) if callable(each) else each for each in args), within

    def _closure(self, closure: Any) -> Any:
        """Returns the closure of a step, which is the loop's own code and not the optimizer's."""

        @functools.wraps(closure)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._recorder.in_closure += 1
            try:
                return closure(*args, **kwargs)
            finally:
                self._recorder.in_closure -= 1

        return run

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        recorder = self._recorder
        if not recorder.running or not recorder.in_step:
            return
        recorder.in_step -= 1
        with recorder.quiet():
            self._samples.pop(id(optimizer)).compare()
        if has_closure(args, kwargs):
            note_stepped(recorder, optimizer)
        for identity in ids_of(optimizer):
            recorder.backwards.pop(identity, None)
        recorder.gradients.forget()
