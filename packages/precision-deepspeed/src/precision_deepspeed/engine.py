"""One DeepSpeed engine, as a training loop needs it: backward as often as one likes, true gradients, then a step.

ZeroEngine     stages 1 and 2: gradients and float32 weights are shards of flat tensors in `engine.optimizer`
Zero3Engine    stage 3: parameters too
PlainEngine    stage 0 over float32 parameters: everything is where torch has it
HalfEngine     stage 0 over bfloat16 parameters: the optimizer holds float32 copies

Every backward is an accumulating one to DeepSpeed; `reduce` ends the accumulation when somebody needs the gradients,
clipping or the step. So nothing depends on knowing in advance which backward is the last.

DeepSpeed skips a step whose gradients are not finite before its scaler hears of it, so under ZeRO the scale of
`torch_autocast` never falls (0.19.8). Its documented way around is used: `override_loss_scale` says what the loss is
multiplied with, and the engine divides by that before it clips and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.checkpoint import CheckpointError
from precision_core.clipping import Clip, clip_true_gradients
from precision_core.gradients import all_finite, multiply

T = TypeVar("T")

TWICE = (
    "fabric.backward after fabric.clip_gradients: the gradients were reduced over ranks already. Call "
    "fabric.clip_gradients once, after the last backward before the step"
)


class Engine:
    """What all stages share. Holds the vendor's engine of one model and one optimizer."""

    def __init__(self, vendor: Any, module: nn.Module, optimizer: Optimizer) -> None:
        self.vendor = vendor
        self.module = module
        self.optimizer = optimizer
        self.names: list[list[str]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.has_gradients = False
        self._reduced = False
        vendor.set_gradient_accumulation_boundary(False)
        vendor.module_forward_pre_hook.remove()  # `forward` does what they do: with them no module can be pickled
        vendor.module_forward_post_hook.remove()

    # ---------------------------------------------------------------- forward and backward

    def forward(self, run: Callable[[], T]) -> T:
        """Returns what `run` does, a forward of the module: what the vendor's `engine.forward` does around it."""
        from deepspeed.runtime.utils import register_output_backward_hooks

        trains = torch.is_grad_enabled()
        if trains:
            self._before_forward()
        self.vendor._forward_prologue((), {})
        try:
            output = run()
        finally:
            self.vendor._forward_epilogue()
        if trains:
            register_output_backward_hooks(output, preprocess_once_fn=self.vendor._backward_prologue)
        return output

    def _before_forward(self) -> None:
        """Tells the vendor's optimizer of a new forward that trains."""

    def backward(self, loss: Tensor, scale: float, retain_graph: bool) -> None:
        """Adds the gradients of `loss` (one number), times `scale` where the mode's scale is not the engine's own."""
        if self._reduced:
            raise RuntimeError(TWICE)
        self._backward(loss, scale, retain_graph)
        self.has_gradients = True

    def _backward(self, loss: Tensor, scale: float, retain_graph: bool) -> None:
        raise NotImplementedError

    # ---------------------------------------------------------------- gradients

    def reduce(self) -> None:
        """Ends the accumulation: gradients are averaged over ranks, once until the step."""
        if not self._reduced:
            self.vendor.set_gradient_accumulation_boundary(True)
            self._reduce()
            self._reduced = True

    def _reduce(self) -> None:
        self.vendor.allreduce_gradients()

    def clip(self, clip: Clip) -> Tensor | None:
        """Clips the coming step; returns the true norm of all gradients for `max_norm` (float32), else None."""
        raise NotImplementedError

    # ---------------------------------------------------------------- the step

    def step(self) -> bool:
        """Steps, or drops gradients that are not finite; returns whether it did that."""
        self.reduce()
        skipped = self._step()
        self.has_gradients = self._reduced = False
        self.vendor.set_gradient_accumulation_boundary(False)
        return skipped

    def _step(self) -> bool:
        raise NotImplementedError

    def drop(self) -> None:
        """Forgets all gradients since the last step, as `optimizer.zero_grad()` does."""
        if self.has_gradients:
            self._drop()
            self.has_gradients = self._reduced = False
            self.vendor.set_gradient_accumulation_boundary(False)

    def _drop(self) -> None:
        self.vendor.zero_grad()

    # ---------------------------------------------------------------- checkpoints

    def holds(self, value: Any) -> bool:
        """Whether `value` is the model, compiled or not, or the optimizer."""
        return value is self.optimizer or self.is_model(value)

    def is_model(self, value: Any) -> bool:
        """Whether `value` is the model, compiled or not."""
        return value is self.module or (isinstance(value, nn.Module) and value._modules.get("_orig_mod") is self.module)

    def save(self, folder: Path, tag: str) -> None:
        """Has the vendor write its files to `folder / tag`, all ranks together."""
        self.vendor.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path) -> None:
        """Has the vendor load the files in `folder`, all ranks together.

        Raises:
            CheckpointError: it could not.
        """
        found, _ = self.vendor.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
        if found is None:
            raise CheckpointError(f"DeepSpeed found no checkpoint in {folder}")
        self._loaded()

    def parameters_changed(self) -> None:
        """Brings master weights to what somebody wrote to the parameters."""

    def _loaded(self) -> None:
        """Brings what is not the vendor's to what was loaded."""

    def destroy(self) -> None:
        """Takes DeepSpeed's hooks off the module and its parameters."""
        self.vendor.destroy()


class ZeroEngine(Engine):
    """Stages 1 and 2."""

    @property
    def _zero(self) -> Any:
        return self.vendor.optimizer

    def _before_forward(self) -> None:
        self._zero.clear_backward_seen_flag()

    def _backward(self, loss: Tensor, scale: float, retain_graph: bool) -> None:
        if not self.has_gradients and self._zero.custom_loss_scaler:
            self._zero.external_loss_scale = scale  # and so it stays until these gradients are stepped
        self.vendor.backward(loss, retain_graph=retain_graph)

    def _reduce(self) -> None:
        if self.vendor.zero_optimization_partition_gradients():
            self._zero.finalize_gradient_accumulation_boundary()
        else:
            self.vendor.allreduce_gradients()

    def clip(self, clip: Clip) -> Tensor | None:
        self.reduce()
        if clip.max_norm is None:
            self._clip_values(clip)
            return None
        if clip.norm_type != 2.0:
            raise ValueError(
                f"clip_gradients(norm_type={clip.norm_type}): under ZeRO DeepSpeed knows the 2-norm only; pass stage=0 "
                "for others"
            )
        parts = torch.stack([torch.as_tensor(part).float().reshape(()) for part in self._norms()])
        # DeepSpeed says -1 for what is not finite.
        norm = torch.linalg.vector_norm(torch.where(parts < 0, torch.inf, parts)) / self._zero.loss_scale
        _check_finite(norm, clip)
        self._zero.clip_grad = clip.max_norm
        return norm

    def _norms(self) -> list[Any]:
        return [self._zero.scaled_global_norm()]

    def _clip_values(self, clip: Clip) -> None:
        assert clip.clip_val is not None
        if self.vendor.zero_cpu_offload():
            raise ValueError(
                "clip_gradients(clip_val=...) with offload_optimizer: DeepSpeed keeps the gradients where it alone "
                "reaches them; pass max_norm"
            )
        gradients = [part for group in self._zero.averaged_gradients.values() for part in group or ()]
        if clip.error_if_nonfinite:
            _check_finite(torch.stack([gradient.float().abs().sum() for gradient in gradients]).sum(), clip)
        limit = clip.clip_val * self._zero.loss_scale
        for gradient in gradients:
            if all_finite([gradient]):  # else it stays, for the step to be skipped
                gradient.clamp_(-limit, limit)

    def _step(self) -> bool:
        self.vendor.step()
        self._zero.clip_grad = 0.0
        return bool(self._zero.overflow)

    def _drop(self) -> None:
        """Does what the vendor does with the gradients of a step that it skips."""
        zero = self._zero
        zero.clip_grad = 0.0
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        if self.vendor.zero_cpu_offload():
            zero.reset_cpu_buffers()
        for index in zero.averaged_gradients:
            zero.averaged_gradients[index] = zero.all_grad_tensors[index] = None
        zero.all_grad_tensors.clear()

    def parameters_changed(self) -> None:
        self._zero.refresh_fp32_params()

    def _loaded(self) -> None:
        self._zero.clip_grad = 0.0  # the files say what it was when they were written


class Zero3Engine(ZeroEngine):
    """Stage 3."""

    def _norms(self) -> list[Any]:
        norms: list[Any] = self._zero._get_norm_groups()
        return norms

    def _drop(self) -> None:
        self._zero.clip_grad = 0.0
        self._zero._overflow_clean_up(self._zero.loss_scale)


class PlainEngine(Engine):
    """Stage 0 over float32 parameters: gradients are in `param.grad`, scaled until `reduce` makes them true."""

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

    def clip(self, clip: Clip) -> Tensor | None:
        self.reduce()
        return clip_true_gradients(list(self._params()), clip)

    def _step(self) -> bool:
        skipped, self._overflow = self._overflow, False
        if skipped:
            self.vendor.zero_grad()
        else:
            self.vendor.step()
        return skipped


class HalfEngine(Engine):
    """Stage 0 over bfloat16 parameters."""

    def __init__(self, vendor: Any, module: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(vendor, module, optimizer)
        for state in optimizer.state.values():  # DeepSpeed has stepped once on zeros, for the state to be there
            if "step" in state:
                state["step"] = state["step"] * 0

    def _backward(self, loss: Tensor, scale: float, retain_graph: bool) -> None:
        self.vendor.backward(loss, retain_graph=retain_graph)

    def clip(self, clip: Clip) -> Tensor | None:
        self.reduce()
        gradients = [param.grad for param in self.module.parameters() if param.grad is not None]
        if clip.max_norm is None:
            return clip_true_gradients(list(self.module.parameters()), clip)
        if clip.norm_type != 2.0:
            raise ValueError(f"clip_gradients(norm_type={clip.norm_type}): DeepSpeed knows the 2-norm only")
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each.float()) for each in gradients]))
        _check_finite(norm, clip)
        self.vendor.optimizer.clip_grad = clip.max_norm
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


def _check_finite(norm: Tensor, clip: Clip) -> None:
    if clip.error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise RuntimeError(f"clip_gradients(error_if_nonfinite=True): the norm of the gradients is {float(norm)}")


def make_engine(vendor: Any, module: nn.Module, optimizer: Optimizer, stage: int, scaled_here: bool) -> Engine:
    """Returns the engine that fits the stage and dtype; `scaled_here`: the loss scale is ours, not DeepSpeed's."""
    if stage == 0:
        vendor.torch_autocast_z0_gradscaler = None
        return (HalfEngine if vendor.bfloat16_enabled() else PlainEngine)(vendor, module, optimizer)
    vendor.optimizer.torch_autocast_gradscaler = None
    if scaled_here:
        vendor.optimizer.override_loss_scale(1.0)
    return (Zero3Engine if stage == 3 else ZeroEngine)(vendor, module, optimizer)
