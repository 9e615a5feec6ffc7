"""Checks of what `fabric.backward` is given, before a loss is scaled: torch's own errors come late and name no call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from precision_core.policy.dtypes import dtype_name

_ALLOWED = "fabric.backward expects the loss, a tensor of one value that came from the model"


def check_loss(loss: Any, has_gradient: bool) -> None:
    """Raises `ValueError` for what no backward can start from; `has_gradient`: one was given along with it."""
    if not isinstance(loss, Tensor):
        raise ValueError(f"{_ALLOWED}; got {_kind(loss)}{_way_out(loss)} [not-a-loss]")
    if not loss.requires_grad:
        raise ValueError(f"{_ALLOWED}; this one has no graph: {_why_no_graph(loss)} [not-a-loss]")
    if loss.numel() != 1 and not has_gradient:
        raise ValueError(
            f"{_ALLOWED}; this one has shape {tuple(loss.shape)}: reduce it with loss.mean() or loss.sum(), or pass "
            "its gradient, fabric.backward(tensor, gradient) [not-a-loss]"
        )


def _kind(loss: Any) -> str:
    return "None" if loss is None else f"a {type(loss).__name__}"


def _way_out(loss: Any) -> str:
    if isinstance(loss, (int, float, complex)) or type(loss).__module__ == "numpy":
        return ". Numbers have no graph: call it before .item() or float()"
    if getattr(loss, "loss", None) is not None or (isinstance(loss, Mapping) and "loss" in loss):
        return ". Pass its loss: fabric.backward(output.loss)" if hasattr(loss, "loss") else '. Pass output["loss"]'
    if isinstance(loss, (list, tuple)):
        return ". Pass the sum of the losses: fabric.backward(sum(losses))"
    if loss is None:
        return ". Was the loss computed and returned, and were the labels given?"
    return ""


def _why_no_graph(loss: Tensor) -> str:
    if not torch.is_grad_enabled():
        return "gradients are disabled here (torch.no_grad()); leave that context to train"
    if loss.is_inference():
        return "it was computed in torch.inference_mode(); run the forward that trains outside of it"
    if not (loss.is_floating_point() or loss.is_complex()):
        return f"it is {dtype_name(loss.dtype)} (a count, or argmax), which has no gradient"
    return (
        "was it computed under torch.no_grad(), detached, made anew by torch.tensor(...), or is every parameter frozen "
        "by requires_grad_(False)?"
    )
