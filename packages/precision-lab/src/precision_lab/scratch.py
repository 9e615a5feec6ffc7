"""Memory that no operation shows: what a kernel has only while it runs, and what a loss keeps behind its one value.

On a CPU oneDNN reorders operands, and threads have buffers. Which blocks oneDNN cuts a product into, and so how large
those are, depends on the CPU, the shape and the threads, and no operation shows it. So the kernel is run on zeros of
the same shapes, once for each, and torch's profiler says what it allocated. That of a large product is little beside
its operands, and not worth the seconds that it would run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry

LARGEST = 1 << 28
"""Operations, multiplications and additions, of a kernel that is run: a tenth of a second on a slow CPU."""
MOST_ELEMENTS = 1 << 24
"""Of its operands."""

aten = torch.ops.aten
KERNELS = {
    *(aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward),
    *(aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward),
    *(aten.mkldnn_rnn_layer, aten.mkldnn_rnn_layer_backward, aten.mean),
}
"""Those whose scratch memory is more than a few bytes."""

LOSSES = {aten.mse_loss, aten.smooth_l1_loss, aten.binary_cross_entropy, aten.soft_margin_loss}
"""They compute a value for each element in the memory of their result, which stays that large when it is one number."""

_known: dict[Any, int] = {}


def scratch_bytes(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Returns how many bytes `func` has on top of its results at most; 0 where it is not known to have any.

    `args` and `kwargs` may have no memory; nothing is written to them.
    """
    if func.overloadpacket in LOSSES:
        behind = bytes_behind(func, args, result)  # the mean is taken from one into another
        return behind * 3 if result.dtype in (torch.bfloat16, torch.float16) else behind  # and of half in float32
    if func.overloadpacket not in KERNELS:
        return 0
    leaves, tree = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(tensor.device.type != "cpu" or tensor.layout is not torch.strided for tensor in tensors):
        return 0
    key = (func, torch.get_num_threads(), tree, *map(_described, leaves))
    if key not in _known:
        _known[key] = 0
        is_small = sum(tensor.numel() for tensor in tensors) <= MOST_ELEMENTS
        if is_small and _operations(func, args, kwargs, result) <= LARGEST:
            with _disable_current_modes(), torch.no_grad():
                real, real_kwargs = tree_unflatten([_zeros(leaf) for leaf in leaves], tree)
                _known[key] = _most_beside_results(lambda: func(*real, **real_kwargs))
    return _known[key]


def bytes_behind(func: Any, args: Any, result: Any) -> int:
    """Returns how many bytes the memory of `result` has on top of its elements."""
    if func.overloadpacket not in LOSSES:
        return 0
    elements = torch.broadcast_shapes(args[0].shape, args[1].shape).numel()
    return max(0, elements * result.itemsize - result.nbytes)


def _described(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _zeros(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype).zero_()


def _operations(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)


def _most_beside_results(call: Callable[[], Any]) -> int:
    call()  # oneDNN makes what it keeps
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = call()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del results
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most - now
