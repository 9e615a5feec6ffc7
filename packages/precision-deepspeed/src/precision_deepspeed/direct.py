"""Calls of autograd by user code, other than `fabric.backward`, on a model of the engine.

Gradients of inputs, for adversarial examples and saliency maps, do not concern the engine: without its prologue and
epilogue they are torch's. DeepSpeed takes every call of autograd for a backward of the training loop: its epilogue then
counts a micro-batch that did not happen, and at stage 3 the next backward adds to the gradients of the last step
(0.19.8).

torch's autograd engine is asked what it is about to execute, since only that tells `torch.autograd.grad(loss, x)` from
`loss.backward()`. `torch._C._will_engine_execute_node`, `_current_graph_task_id`, `_functorch.peek_interpreter_stack`
are private names, which DeepSpeed uses as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from precision_core.policy import map_tensors

PLAIN_BACKWARD = (
    "loss.backward() on a model that fabric.setup gave to DeepSpeed, whose engine steps only the gradients of "
    "fabric.backward(loss): call that. For gradients of inputs alone: torch.autograd.grad(loss, x), or "
    "loss.backward(inputs=[x]). Nothing was changed [plain-backward]"
)

SECOND_ORDER = (
    "torch.autograd.grad(..., create_graph=True): second-order gradients (gradient penalties, Hessian-vector products) "
    "need the parameters in both backwards, and DeepSpeed's stage 3 frees the gathered ones after the first: pass "
    "stage=0, 1 or 2 to DeepSpeedStrategy, which support this, and then call fabric.backward(loss). Nothing was changed"
    " [second-order]"
)

AGAIN = (
    "a second backward through one forward of the model: DeepSpeed's stage 3 has freed the parameters that it gathered "
    "for the first, retain_graph=True or not. Call the model again for each backward (or torch.autograd.grad), or pass "
    "stage=0, 1 or 2 to DeepSpeedStrategy"
)

TRANSFORMED = (
    "torch.func (grad, vmap, jvp, ...) of a model at DeepSpeed's stage 3, whose gathers and linear layers it cannot "
    "transform: pass stage=0, 1 or 2 to DeepSpeedStrategy, or take first-order gradients with "
    "torch.autograd.grad(loss, x). Nothing was changed"
)


def check_fills_no_gradients(module: nn.Module) -> None:
    """Raises `RuntimeError` if the autograd call that is running would write to `param.grad`."""
    for param in module.parameters():
        if param.requires_grad and _will_fill(param):
            raise RuntimeError(PLAIN_BACKWARD)


def _will_fill(param: Tensor) -> bool:
    if _is_transforming():  # torch.func differentiates by a function's arguments, not by parameters
        return False
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(param).node))
    except RuntimeError:  # `torch.autograd.grad(loss, param)`, which returns the gradient
        return False


def _is_transforming() -> bool:
    """Whether this runs inside a `torch.func` transform."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def check_not_transformed() -> None:
    """Raises `RuntimeError` inside a `torch.func` transform, where stage 3 would end the process."""
    if _is_transforming():
        raise RuntimeError(TRANSFORMED)


def once(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns a gradient hook for one forward that calls `function`; in a second backward it raises `RuntimeError`."""
    first: int | None = None

    def check(gradient: Tensor) -> Tensor:
        nonlocal first
        now = torch._C._current_graph_task_id()
        if first is None:
            gradient = function(gradient)
            first = now
            return gradient
        if now != first:
            raise RuntimeError(AGAIN)
        return function(gradient)

    return check


def check_in_shards(offload: Any, gradient: Tensor) -> Tensor:
    """Gradient hook on the outputs of a model at stage 3: has gathered layers freed at the end of the backward.

    Raises:
        RuntimeError: the backward records a graph (`create_graph=True`).
    """
    if torch.is_grad_enabled():
        raise RuntimeError(SECOND_ORDER)
    # Layers whose inputs need no gradients, and those that the backward does not reach, would stay gathered.
    torch.autograd.Variable._execution_engine.queue_callback(offload.release_backward_leftovers)
    return gradient


def on_gradients_of(output: Any, function: Callable[[Tensor], Tensor]) -> None:
    """Registers `function` as a gradient hook of the tensors in `output`: it runs before autograd enters the model."""

    def watch(tensor: Tensor) -> Tensor:
        if tensor.grad_fn is not None:
            tensor.register_hook(function)
        return tensor

    map_tensors(output, watch)
