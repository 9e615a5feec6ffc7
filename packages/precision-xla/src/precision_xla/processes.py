"""One process a device, for `XLAStrategy(spmd=False)`: written by the vendor's documents, and not run by anybody yet.

torch_xla's collectives between CPU processes time out, so that it takes TPUs to try this.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from precision_core.policy import map_tensors
from precision_core.strategies import reduce_op
from precision_xla import vendor

T = TypeVar("T")


def run_function(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Returns what `function(*args)` returns on rank zero of a process for each TPU; both must pickle."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result")
        vendor.launch(_run, (function, args, result))
        return pickle.loads(result.read_bytes())


def _run(index: int, function: Callable[..., Any], args: tuple[Any, ...], result: Path) -> None:
    returned = function(*args)
    if vendor.ordinals()[0] == 0:
        result.write_bytes(pickle.dumps(returned))


def average_gradients(params: Iterable[nn.Parameter], dtype: torch.dtype, stored: torch.dtype, count: int) -> None:
    """Averages gradients over all processes, those of dtype `stored` in `dtype`; the graph waits for nobody yet.

    What is an average already stays what it is, so that each backward of an accumulation may end with it.
    """
    gradients = [param.grad for param in params if param.grad is not None]
    sent = [gradient.to(dtype if gradient.dtype is stored else gradient.dtype) for gradient in gradients]
    vendor.all_reduce(sent, "sum", 1 / count)
    with torch.no_grad():
        for gradient, average in zip(gradients, sent, strict=True):
            if average is not gradient:
                gradient.copy_(average)


def all_reduce(data: T, op: str, device: torch.device, count: int) -> T:
    """Returns `data` with each tensor's "mean", "sum", "min" or "max" over all processes."""
    reduce_op(op)

    def reduce(tensor: Tensor) -> Tensor:
        sent = tensor.detach().to(device, copy=True)
        vendor.all_reduce([sent], "sum" if op == "mean" else op, 1.0)
        return (sent / count if op == "mean" else sent).to(tensor.device)

    return map_tensors(data, reduce)


def all_gather(data: T, device: torch.device) -> T:
    """Returns `data` with each tensor as (world_size, *shape)."""
    return map_tensors(data, lambda tensor: vendor.all_gather(tensor.detach().to(device)).to(tensor.device))


def broadcast(data: T, src: int, rank: int, device: torch.device) -> T:
    """Returns process `src`'s `data`, any object that pickles, its tensors on `device`; waits for all processes."""
    payload = pickle.dumps(map_tensors(data, lambda tensor: tensor.detach().cpu())) if rank == src else b""
    received: T = pickle.loads(vendor.broadcast_bytes(payload)[src])
    return map_tensors(received, lambda tensor: tensor.to(device))
