"""Aligned: casts operands of calls that torch refuses for several dtypes, for models with some wider tensors.

Matrix products, norms whose input is wider than their weights, and writes to indices. Calls that torch takes as they
are, elementwise sums and products above all, keep torch's own type promotion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precision_core.policy.casting import map_tensors
from precision_core.policy.dtypes import FLOAT_DTYPES, HALF_DTYPES

_NEWER = ((torch, "_grouped_mm"), (F, "grouped_mm"))  # than the oldest torch that core takes

_PRODUCTS = frozenset(
    {
        *(
            getattr(torch, name)
            for name in ("matmul", "mm", "bmm", "mv", "dot", "inner", "tensordot", "einsum", "cdist")
        ),
        *(getattr(torch, name) for name in ("addmm", "addmv", "addbmm", "baddbmm", "bilinear", "prelu", "lerp")),
        *(getattr(Tensor, name) for name in ("matmul", "mm", "bmm", "mv", "dot", "inner", "__matmul__", "__rmatmul__")),
        *(getattr(Tensor, name) for name in ("addmm", "addmv", "addbmm", "baddbmm", "prelu", "lerp")),
        *(getattr(F, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)),
        *(getattr(torch._VF, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
        *(getattr(torch._VF, name) for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")),
        *(getattr(module, name) for module, name in _NEWER if hasattr(module, name)),
        F.linear,
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        torch._transformer_encoder_layer_fwd,  # what nn.TransformerEncoderLayer calls in evaluation
    }
)
"""torch raises for operands of several dtypes here."""

_BATCH_NORMS = frozenset({F.batch_norm, F.instance_norm})

_NORMS = frozenset({F.layer_norm, F.group_norm}) | _BATCH_NORMS
"""torch takes half inputs beside float32 weights here, and no other two dtypes."""

_WRITES = frozenset(
    {
        *(getattr(torch, name) for name in ("index_add", "index_copy", "index_put", "scatter", "scatter_add")),
        *(getattr(Tensor, name) for name in ("index_add", "index_copy", "index_put", "scatter", "scatter_add")),
        *(getattr(Tensor, name) for name in ("index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_")),
        *(torch.masked_scatter, Tensor.masked_scatter, Tensor.masked_scatter_, Tensor.__setitem__),
    }
)
"""torch wants what is written in the dtype of what it is written to, its first argument."""

ALIGNED = _PRODUCTS | _NORMS | _WRITES


def aligned(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    """Returns the arguments of `func`, one of `ALIGNED`, as torch takes them.

    Floating tensors of several dtypes are cast to that of the parameter among them, else to `dtype`; what is written,
    to that of what it is written to; the weights of a norm with running statistics, to theirs.
    """
    floats = [tensor for tensor in tensors((args, kwargs)) if tensor.dtype in FLOAT_DTYPES]
    if len({tensor.dtype for tensor in floats}) < 2:
        return args, kwargs
    if func in _WRITES:
        wanted = floats[0].dtype
    else:
        wanted = next((tensor.dtype for tensor in floats if isinstance(tensor, nn.Parameter)), dtype)
    statistics = (args[1] if len(args) > 1 else kwargs.get("running_mean")) if func in _BATCH_NORMS else None
    if statistics is not None:  # which are updated in place, so that the others follow them
        wanted = statistics.dtype
        kwargs = {
            **kwargs,
            **{key: kwargs[key].to(wanted) for key in ("weight", "bias") if kwargs.get(key) is not None},
        }
        return args if _norm_takes(args[0], wanted) else (args[0].to(wanted), *args[1:]), kwargs
    if func in _NORMS and _norm_takes(args[0] if args else kwargs["input"], wanted):
        return args, kwargs
    return map_tensors((args, kwargs), lambda tensor: tensor.to(wanted) if tensor.dtype in FLOAT_DTYPES else tensor)


def _norm_takes(input: Tensor, weights: torch.dtype) -> bool:
    return input.dtype is weights or (weights is torch.float32 and input.dtype in HALF_DTYPES)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors among the arguments of a call."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple, dict)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(value)
