"""The engines of stage 0, which averages gradients and shards nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.scaling import Clip, all_finite, clip_unscaled, multiply
from precision_deepspeed.checkpoints import Fragment
from precision_deepspeed.engine import Engine, check_finite, tighten


class PlainEngine(Engine):
    """Stage 0 over float32 parameters: gradients are in `param.grad`, scaled until `reduce` unscales them."""

    steps_parameters = True

    def __init__(self, vendor: Any, module: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(vendor, module, optimizer)
        self._scale = 1.0
        self._overflow = False

    @property
    def _gradients(self) -> list[Tensor]:
        return [param.grad for param in self._params() if param.grad is not None]

    def _params(self) -> Iterator[nn.Parameter]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def _backward(self, loss: Tensor, scale: float, retain_graph: bool) -> None:
        if not self.has_gradients:
            self._scale = scale
        self.vendor.backward(loss if self._scale == 1.0 else loss * self._scale, retain_graph=retain_graph)

    def _reduce(self) -> None:
        super()._reduce()
        if self._scale != 1.0:
            self._overflow = not all_finite(self._gradients)
            multiply(self._gradients, 1.0 / self._scale)

    def unscale(self) -> None:
        self.reduce()

    def clip(self, clip: Clip) -> Tensor | None:
        self.reduce()
        return clip_unscaled(list(self._params()), clip)

    def _step(self) -> bool:
        skipped, self._overflow = self._overflow, False
        if skipped:
            self.vendor.zero_grad()
        else:
            self.vendor.step()
        return skipped

    def _flats(self) -> list[Tensor]:
        return list(self._params())

    def _fragments(self) -> Iterator[Fragment]:
        names = [name for group in self.names["groups"] for name in group]
        for flat, (name, param) in enumerate(zip(names, self._params(), strict=True)):
            if name not in self.names["frozen"]:
                yield Fragment(name, flat, 0, 0, param.numel())

    def _write_optimizer(self, masters: list[Tensor], as_base: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.optimizer.load_state_dict(as_base(self.optimizer.state_dict()))  # the masters are the parameters


class HalfEngine(Engine):
    """Stage 0 over bfloat16 parameters, with float32 master weights."""

    def __init__(self, vendor: Any, module: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(vendor, module, optimizer)
        for state in optimizer.state.values():  # DeepSpeed has stepped once on zeros, for the state to be there
            if "step" in state:
                state["step"] = state["step"] * 0
        # DeepSpeed's own waits for the device once a parameter
        vendor.optimizer.overflow_checker.has_overflow_serial = lambda params: (
            not all_finite([param.grad for param in params if param.grad is not None])
        )

    def _backward(self, loss: Tensor, scale: float, retain_graph: bool) -> None:
        self.vendor.backward(loss, retain_graph=retain_graph)

    def unscale(self) -> None:
        self.reduce()

    def clip(self, clip: Clip) -> Tensor | None:
        self.reduce()
        gradients = [param.grad for param in self.module.parameters() if param.grad is not None]
        limit = self.vendor.optimizer.clip_grad
        if clip.max_norm is None:
            tighten(limit, torch.zeros(()), clip)
            return clip_unscaled(list(self.module.parameters()), clip)
        if clip.norm_type != 2.0:
            raise ValueError(f"clip_gradients(norm_type={clip.norm_type}): DeepSpeed clips by the 2-norm only")
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each.float()) for each in gradients]))
        check_finite(norm, clip)
        self.vendor.optimizer.clip_grad, norm = tighten(limit, norm, clip)
        return norm

    def _step(self) -> bool:
        self.vendor.step()
        self.vendor.optimizer.clip_grad = 0.0
        return bool(self.vendor.optimizer.overflow)

    @torch.no_grad()
    def parameters_changed(self) -> None:
        vendor = self.vendor.optimizer
        for params, masters in zip(vendor.fp16_groups, vendor.fp32_groups, strict=True):
            for param, master in zip(params, masters, strict=True):
                master.copy_(param)

    def _drop(self) -> None:
        self.vendor.optimizer.clip_grad = 0.0
        super()._drop()

    def _flats(self) -> list[Tensor]:
        return [master for group in self.vendor.optimizer.fp32_groups for master in group]

    def _fragments(self) -> Iterator[Fragment]:
        names = [name for group in self.names["groups"] for name in group if name not in self.names["frozen"]]
        for flat, (name, master) in enumerate(zip(names, self._flats(), strict=True)):
            yield Fragment(name, flat, 0, 0, master.numel())

    def _write_optimizer(self, masters: list[Tensor], as_base: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        for flat, master in zip(self._flats(), masters, strict=True):
            flat.copy_(master)
        self.optimizer.load_state_dict(as_base(self.optimizer.state_dict()))
