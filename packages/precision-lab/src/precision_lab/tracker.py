"""Bytes of all tensors that are alive, followed through every operation, without memory behind them.

Under `FakeTensorMode` operations compute shapes and dtypes only. A dispatch mode above it sees each result, forward,
backward and optimizer alike, and each storage says itself when it goes. torch has such a tracker,
`torch.distributed._tools.MemTracker`, whose module hooks take other memory for optimizer state where parameters are
replaced after it started; the part that is needed here is what follows.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from precision_lab.scratch import bytes_behind, scratch_bytes

GATHERED = "gathered"
"""The phase of a storage that was resized, whenever that was."""


class Tracker(TorchDispatchMode):
    """Counts the bytes of storages that were created inside of it and are alive.

    `phase` is noted of each storage when it is created. `at_peak` is called when operation number `watch` has run.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        self.alive: dict[int, tuple[int, str, int]] = {}
        """Storage (by `key_of`) -> bytes, the phase that it was created in, and its number: addresses come again."""
        self._numbers = itertools.count()
        self.current = 0
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._flags: set[int] = set()
        self.reset()

    def reset(self, watch: int | None = None, at_peak: Callable[[], None] | None = None) -> None:
        """Counts operations and the peak anew."""
        self.peak, self.operations, self.peak_at = self.current, 0, 0
        self._watch, self._at_peak = watch, at_peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(each, "__tensor_flatten__") for each in types):
            return NotImplemented  # a DTensor computes with its shard, and that is seen here
        if func is torch.ops.aten._local_scalar_dense.default:  # `.item()`: no tensor has a value here
            dtype = args[0].dtype
            if key_of(args[0]) in self._flags:
                return 0.0
            return 1.0 if dtype.is_floating_point else dtype is not torch.bool and 1
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mkldnn_rnn_layer.default:
            result = (*result[:3], _workspace_of_lstm(args, result[3]))
        if func is torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default:
            self._flags.add(key_of(args[1]))  # that a scaled gradient overflowed: it did not
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, bytes_behind(func, args, leaf))
        self.operations += 1
        meanwhile = self.current + scratch_bytes(func, args, kwargs or {}, result)
        if meanwhile > self.peak:
            self.peak, self.peak_at = meanwhile, self.operations
        if self._watch == self.operations and self._at_peak is not None:
            self._at_peak()
        return result

    def _add(self, tensor: Tensor, behind: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes() + behind
        self.alive[key] = size, self.phase, next(self._numbers)
        self.current += size
        self._refs[key] = weakref.ref(storage, lambda _: self._remove(key))

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Context in which storages that are resized in place are seen to be: FSDP2 frees gathered weights like that.

        No operation shows it, so torch's method is another one meanwhile.
        """
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            if (key := storage._cdata) in self.alive:
                before, *_ = self.alive[key]
                self.alive[key] = size, GATHERED, next(self._numbers)
                self.current += size - before
            return storage

        torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def _remove(self, key: int) -> None:
        size, *_ = self.alive.pop(key)
        self.current -= size
        del self._refs[key]
        self._flags.discard(key)


def _workspace_of_lstm(args: Any, fake: Tensor) -> Tensor:
    """Returns a fake workspace of the size of a real one, which oneDNN alone knows: the layer is run once on zeros."""
    with torch.utils._python_dispatch._disable_current_modes(), torch.enable_grad():
        real = [torch.zeros(each.shape, dtype=each.dtype) if isinstance(each, Tensor) else each for each in args]
        real[0].requires_grad_()  # else there is none
        workspace = torch.ops.aten.mkldnn_rnn_layer.default(*real)[3]
        size = 0 if workspace is None else workspace.nbytes
    return fake.new_empty(size)


def key_of(tensor: Tensor) -> int:
    """Returns what `Tracker.alive` calls the tensor's storage; of a DTensor its shard's, of a subclass its first."""
    local = getattr(tensor, "to_local", None)
    return (tensor if local is None else local()).untyped_storage()._cdata


def fake_mode() -> Any:
    """Returns the mode under which tensors have no memory; real ones from before may take part."""
    return torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
