"""A step's forward and backward, once more; the model, its gradients and the random state are as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from precision_lab.explaining.numbers import is_finite, tensors
from precision_lab.explaining.watched import IN_LOSS, LOSS, Modules, Watched, storage_of
from precision_lab.explaining.wide import Wide

Context = Callable[[], AbstractContextManager[Any]]


@dataclass
class Step:
    """What a step needs in order to run once more."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Context
    rng_state: Mapping[str, Any] = field(default_factory=dict)  # device type -> state
    output_gradients: list[Tensor | None] | None = None
    loss: Callable[[Any], Tensor] | None = None
    scale: float = 1.0
    dropout: bool = True  # False: its modules let all through


@dataclass
class Outcome:
    """What came of it."""

    tensors: list[Tensor] = field(default_factory=list)  # of the outputs, in order
    outputs: list[Tensor] = field(default_factory=list)  # those of numbers with a fraction
    loss: Tensor | None = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    error: str = ""
    went_backward: bool = False
    random: bool = False  # whether random numbers were drawn

    def bad(self) -> tuple[str, Tensor] | None:
        """Returns the first of outputs, loss and gradients that is not finite."""
        named = [(f"output {number}", each) for number, each in enumerate(self.outputs)]
        named += [("the loss", self.loss)] if self.loss is not None else []
        named += [(f"the gradient of {name}", each) for name, each in self.gradients.items() if each is not None]
        return next(((name, each) for name, each in named if not is_finite(each)), None)

    @property
    def finite(self) -> bool:
        """Whether it ran to its end and all is finite."""
        return not self.error and self.bad() is None


def inner(model: nn.Module) -> nn.Module:
    """Returns the model without wrappers that would talk to other ranks, or run compiled code."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    return model


def run(
    step: Step, modules: Modules, watched: Watched | None = None, wide: Wide | None = None, backward: bool = True
) -> Outcome:
    """Runs the step; an error of the model is part of the outcome."""
    outcome = Outcome()
    with _kept(step.model), _random(step.rng_state), ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(modules.followed())
        modules.outside = ""
        for module in step.model.modules():
            if not step.dropout and isinstance(module, _DropoutNd):
                module.training = False
        state = torch.get_rng_state()
        for device in ("cpu", "cuda"):  # that this is called in: the step's own is the step's
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        args, kwargs = copied((step.args, step.kwargs))
        if watched is not None:
            watched.leaves.update(_leaves(step.model, args, kwargs, step.output_gradients or []))
        if wide is not None:
            stack.enter_context(wide)
        if watched is not None:
            stack.enter_context(watched)
        try:
            with step.context():
                made = step.model(*args, **kwargs)
                outcome.tensors = list(tensors(made))
                outcome.outputs = [each for each in outcome.tensors if each.is_floating_point()]
                modules.outside = IN_LOSS
                if watched is not None:
                    watched.phase, watched.forward_ended = LOSS, watched.number
                if step.loss is not None:
                    outcome.loss = step.loss(made)
            if backward:
                _backward(step, outcome, wide)
        except Exception as error:  # the user's code, on values that are not finite
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.random = not torch.equal(state, torch.get_rng_state())
    return outcome


def _backward(step: Step, outcome: Outcome, wide: Wide | None) -> None:
    roots: list[Tensor] = []
    given: list[Tensor | None] = []
    if outcome.loss is not None:
        roots, given = [outcome.loss], [torch.full_like(outcome.loss, step.scale)]
    elif step.output_gradients is not None:
        reached = outcome.tensors
        if len(reached) != len(step.output_gradients):
            reached = [each for each in outcome.outputs if each.requires_grad]
        for output, gradient in zip(reached, step.output_gradients, strict=False):
            if gradient is not None and output.requires_grad:
                roots.append(output)
                given.append(gradient.to(output.dtype))
    elif len(outcome.outputs) == 1 and outcome.outputs[0].numel() == 1:
        roots, given = [outcome.outputs[0]], [torch.full_like(outcome.outputs[0], step.scale)]
    if not roots or not any(each.requires_grad for each in roots):
        return
    params = {name: each for name, each in step.model.named_parameters() if each.requires_grad}
    targets = [wide.leaf(each) if wide is not None else each for each in params.values()]
    if not targets:
        return
    outcome.went_backward = True
    if _checkpoints(roots):
        found = _accumulated(roots, given, targets)
    else:
        found = torch.autograd.grad(roots, targets, given, allow_unused=True)
    outcome.gradients = dict(zip(params, found, strict=True))


def _checkpoints(roots: list[Tensor]) -> bool:
    """Whether a checkpoint with use_reentrant=True is in the graph: `grad` would pass over what is in it."""
    seen: set[Any] = set()
    waiting = [root.grad_fn for root in roots]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if node.name() == "CheckpointFunctionBackward":
                return True
            seen.add(node)
            waiting += [each for each, _ in node.next_functions]
    return False


def _accumulated(roots: list[Tensor], given: list[Tensor | None], targets: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Returns the gradients, by `backward`, without the hooks of parameters."""
    hooks = [(each, each._post_accumulate_grad_hooks) for each in targets]
    before = [each.grad for each in targets]
    try:
        for each in targets:
            each.grad = None
            each._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        torch.autograd.backward(roots, given)
        return tuple(each.grad for each in targets)
    finally:
        for (each, hook), gradient in zip(hooks, before, strict=True):
            each.grad = gradient
            each._post_accumulate_grad_hooks = hook


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Context in which buffers are copies, after which they and all attributes of modules are the old ones."""
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    grads = [(param, param.grad) for param in model.parameters()]
    copies: dict[int, Tensor] = {}
    for module, before in zip(modules, buffers, strict=True):
        for name, buffer in before.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
    try:
        yield
    finally:
        for module, old, before in zip(modules, attributes, buffers, strict=True):
            module.__dict__.clear()
            module.__dict__.update(old)
            module._buffers.clear()
            module._buffers.update(before)
        for param, gradient in grads:
            if param.grad is not gradient:
                param.grad = gradient


@contextmanager
def _random(state: Mapping[str, Any]) -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        for device, value in state.items():
            if device == "cpu":
                torch.set_rng_state(value)
            else:
                of = getattr(torch, device)
                (of.set_rng_state_all if isinstance(value, (list, tuple)) else of.set_rng_state)(value)
        yield


def copied(value: Any) -> Any:
    """Returns a batch with copies of its tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad and value.is_floating_point())
    if type(value) is dict:
        return {key: copied(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(each) for each in value)
    return value


def _leaves(model: nn.Module, args: Any, kwargs: Any, gradients: list[Tensor | None]) -> dict[int, str]:
    found: dict[int, str] = {}
    for number, gradient in enumerate(gradients):
        if gradient is not None:
            found[storage_of(gradient)] = f"gradient of output {number}"
    named: list[tuple[str, Any]] = [(f"input {number}", each) for number, each in enumerate(args)]
    named += [(f"input {key}", each) for key, each in kwargs.items()]
    for name, each in named:
        found.update({storage_of(tensor): name for tensor in tensors(each)})
    found.update({storage_of(each): f"buffer {name}" for name, each in model.named_buffers()})
    found.update({storage_of(each): f"parameter {name}" for name, each in model.named_parameters()})
    return found
