"""The engine of stage 3, where parameters are shards too, gathered layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.precision import outside_created_as
from precision_deepspeed import vendor
from precision_deepspeed.checkpoints import Fragment, Saved
from precision_deepspeed.direct import check_in_shards, check_not_transformed, once
from precision_deepspeed.zero_engine import ZeroEngine

T = TypeVar("T")


class Zero3Engine(ZeroEngine):
    """Stage 3: DeepSpeed gathers each layer's parameters for its forward and backward, and frees them after it."""

    _BASE, _MASTERS = "optimizer_state_dict", "fp32_flat_groups"

    def __init__(self, vendor: Any, module: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(vendor, module, optimizer)
        self._earlier: set[int] = set()
        if (
            self._zero.dtype is not torch.float32
        ):  # forward runs in core's `created_as`, which their many small calls of torch need not go through
            offload = self._zero.parameter_offload
            for handle in (*offload.forward_hooks, *offload.backward_hooks):
                hooks = handle.hooks_dict_ref()
                hooks[handle.id] = outside_created_as(hooks[handle.id])

    def forward(self, run: Callable[[], T]) -> T:
        check_not_transformed()
        return super().forward(run)

    def _watch(self) -> Callable[[Tensor], Tensor]:
        return once(super()._watch())

    def _check_direct(self, gradient: Tensor) -> None:
        super()._check_direct(gradient)
        check_in_shards(self._zero.parameter_offload, gradient)

    def _norms(self) -> list[Any]:
        norms: list[Any] = self._zero._get_norm_groups()
        return norms

    def _drop(self) -> None:
        self._earlier |= self._written
        self._zero._offload_boundary_param_ids = set()  # else discarded gradients count as this step's
        self._zero.clip_grad = 0.0
        self._end_backward()
        self._zero._overflow_clean_up(self._zero.loss_scale)
        self._forget()

    def _kept_gradients(self) -> Iterable[Tensor]:
        return ()  # `_backward` zeroes fewer: all of them took 4 % of a step with 4 million parameters

    @property
    def _written(self) -> set[int]:
        """The `ds_id` of parameters that got gradients on this rank since the last step."""
        written: set[int] = self._zero._offload_boundary_param_ids
        return written

    def _backward(self, loss: Tensor, scale: float, retain_graph: bool) -> None:
        super()._backward(loss, scale, retain_graph)
        # The first backward overwrites gradients of earlier steps, of the parameters that it reaches. The others' would
        # be stepped, or added to.
        for number in self._earlier - self._written:
            self._zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[number].zero_()
        self._earlier = set()

    def _step(self) -> bool:
        self._earlier |= self._written
        return super()._step()

    def _flats(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    def _fragments(self) -> Iterator[Fragment]:
        for name, param in self.module.named_parameters():
            position = self._zero.grad_position.get(self._zero.get_param_id(param)) if param.requires_grad else None
            if position is not None:
                flat, start, numel = position
                offset = torch.distributed.get_rank() * numel
                yield Fragment(
                    name, flat, start, offset, min(numel, max(math.prod(self.names["shapes"][name]) - offset, 0))
                )

    def _write_module(self, saved: Saved) -> None:
        rest = saved.rest()
        frozen = [param for name, param in self.module.named_parameters() if name in rest]
        with vendor.gathered(frozen, writes=True):
            self.module.load_state_dict(rest, strict=False)

    def _write_optimizer(self, masters: list[Tensor], as_base: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._zero.checkpoint_event_prologue()
        super()._write_optimizer(masters, as_base)  # from which DeepSpeed writes the shards of parameters
        self._zero.checkpoint_event_epilogue()
