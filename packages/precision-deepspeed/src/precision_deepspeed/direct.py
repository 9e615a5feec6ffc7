"""Autograd that the user's own code calls on a model of the engine, in place of `fabric.backward`.

Gradients of inputs, as adversarial examples and saliency maps take them, are none of the engine's business: with its
own prologue and epilogue left out they are torch's. DeepSpeed takes every call of autograd for a backward of the
training loop: its epilogue then counts a micro-batch that there was none of, and at stage 3 the next backward adds to
the gradients of the last step (0.19.8).

torch's engine is asked what it is about to execute, since that alone tells `torch.autograd.grad(loss, x)` from
`loss.backward()`. `torch._C._will_engine_execute_node`, `_current_graph_task_id`, `_functorch.peek_interpreter_stack`
are private names, on which DeepSpeed stands as well.
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
    "loss.backward(inputs=[x]). Nothing was changed"
)

SECOND_ORDER = (
    "torch.autograd.grad(..., create_graph=True): second-order gradients (gradient penalties, Hessian-vector products) "
    "need the parameters in both backwards, and DeepSpeed's stage 3 has freed the gathered ones after the first: pass "
    "stage=0, 1 or 2 to DeepSpeedStrategy, where this and then fabric.backward(loss) are right. Nothing was changed"
)

AGAIN = (
    "a second backward through one forward of the model: DeepSpeed's stage 3 has freed the parameters that it gathered "
    "for the first, retain_graph=True or not. Call the model again for each backward (or torch.autograd.grad), or pass "
    "stage=0, 1 or 2 to DeepSpeedStrategy"
)

TRANSFORMED = (
    "torch.func (grad, vmap, jvp and the rest) of a model at DeepSpeed's stage 3, whose gathers and linear layers it "
    "cannot transform: pass stage=0, 1 or 2 to DeepSpeedStrategy, or take first-order gradients with "
    "torch.autograd.grad(loss, x). Nothing was changed"
)


def check_fills_no_gradients(module: nn.Module) -> None:
    """Raises `RuntimeError` where the autograd call that is running would write to `param.grad`."""
    for param in module.parameters():
        if param.requires_grad and _will_fill(param):
            raise RuntimeError(PLAIN_BACKWARD)


def _will_fill(param: Tensor) -> bool:
    if _is_transforming():  # which differentiates the arguments of a function, and no parameters
        return False
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(param).node))
    except RuntimeError:  # `torch.autograd.grad` of the parameter itself, which it returns
        return False


def _is_transforming() -> bool:
    """Whether `torch.func` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def check_not_transformed() -> None:
    """Raises `RuntimeError` under `torch.func`, in which stage 3 ends the process."""
    if _is_transforming():
        raise RuntimeError(TRANSFORMED)


def once(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns `function` for the gradients of one forward, which raises `RuntimeError` in a second call of autograd."""
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
    """Returns the gradient that autograd takes into a model of stage 3, whose layers are freed again behind it.

    Raises:
        RuntimeError: the call of autograd that is running records a graph of its own.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(SECOND_ORDER)
    # Layers whose inputs need no gradients, and those that the call did not reach, would stay gathered over a step.
    torch.autograd.Variable._execution_engine.queue_callback(offload.release_backward_leftovers)
    return gradient


def on_gradients_of(output: Any, function: Callable[[Tensor], Tensor]) -> None:
    """Has `function` called with each gradient that reaches a tensor in `output`, before autograd enters the model."""

    def watch(tensor: Tensor) -> Tensor:
        if tensor.grad_fn is not None:
            tensor.register_hook(function)
        return tensor

    map_tensors(output, watch)
