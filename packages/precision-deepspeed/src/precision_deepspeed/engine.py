"""One DeepSpeed engine, as a training loop needs it: any number of backwards, unscaled gradients, then a step.

zero_engine.ZeroEngine      stages 1 and 2: gradients and float32 weights are shards of flat tensors
zero3_engine.Zero3Engine    stage 3: parameters too
plain_engine.PlainEngine    stage 0 over float32 parameters: everything is where torch has it
plain_engine.HalfEngine     stage 0 over bfloat16 parameters: the optimizer holds float32 copies

Every backward is an accumulating one to DeepSpeed; `reduce` ends the accumulation when clipping or the step
needs the gradients. So nothing depends on knowing in advance which backward is the last. DeepSpeed's own way to that,
`managed_gradient_accumulation: false`, reduces in its step alone, too late for clipping (tests/test_vendor.py).

DeepSpeed skips a step whose gradients are not finite before its scaler hears of it, so under ZeRO the scale of
`torch_autocast` never falls (0.19.8). Its documented way around is used: `override_loss_scale` sets the factor that
the loss is multiplied by, and the engine divides gradients by it before it clips and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.checkpoint import CheckpointError
from precision_core.scaling import Clip
from precision_deepspeed.checkpoints import Fragment, Saved, fill
from precision_deepspeed.direct import check_fills_no_gradients, on_gradients_of

T = TypeVar("T")

ALREADY_REDUCED = (
    "fabric.backward: this step's gradients are reduced already (clip_gradients, or a step that raised, ended the "
    "accumulation). Call clip_gradients once, after the last backward; optimizer.zero_grad() discards the gradients"
)
INCOMPLETE = (
    "the last fabric.backward raised, and only a part of the model has gradients: call optimizer.zero_grad(), which "
    "discards all gradients since the last step, then continue"
)


class Engine:
    """What all stages share. `vendor` is DeepSpeed's engine of one model and one optimizer."""

    steps_parameters = False
    """Whether the optimizer holds the model's own parameters."""

    def __init__(self, vendor: Any, module: nn.Module, optimizer: Optimizer) -> None:
        self.vendor = vendor
        self.module = module
        self.optimizer = optimizer
        self.names: dict[str, Any] = {}
        """What `checkpoints.describe` says of the model."""
        self.has_gradients = False
        self._reduced = self._failed = False
        self._running = self._begun = False  # `backward`, and the first gradient in it
        self._frozen = [(name, param) for name, param in module.named_parameters() if not param.requires_grad]
        vendor.set_gradient_accumulation_boundary(False)
        vendor.module_forward_pre_hook.remove()  # which `forward` calls itself: modules with these hooks do not pickle
        vendor.module_forward_post_hook.remove()

    # ---------------------------------------------------------------- forward and backward

    def forward(self, run: Callable[[], T]) -> T:
        """Returns `run()`, a forward of the module, with what DeepSpeed's `engine.forward` does before and after it."""
        trains = torch.is_grad_enabled()
        if trains:
            self._before_forward()
        self.vendor._forward_prologue((), {})
        try:
            output = run()
        finally:
            self.vendor._forward_epilogue()
        if trains:
            on_gradients_of(output, self._watch())
        return output

    def _watch(self) -> Callable[[Tensor], Tensor]:
        """Returns the gradient hook for the outputs of one forward."""
        return self._arrived

    def _arrived(self, gradient: Tensor) -> Tensor:
        """Gradient hook: runs when a gradient reaches an output of the model, in any call of autograd."""
        if not self._running:
            self._check_direct(gradient)
        elif not self._begun:
            self._begun = True
            self.vendor._backward_prologue()
        return gradient

    def _check_direct(self, gradient: Tensor) -> None:
        """Raises `RuntimeError` for a call of autograd other than `backward`'s that this stage cannot run."""
        check_fills_no_gradients(self.module)

    def _before_forward(self) -> None:
        """Tells DeepSpeed's optimizer that a forward with gradients begins."""

    def backward(self, loss: Tensor, scale: float, retain_graph: bool) -> None:
        """Accumulates the gradients of `loss`, a scalar, times `scale` unless the loss scale is DeepSpeed's own."""
        if self._reduced:
            raise RuntimeError(ALREADY_REDUCED)
        self._check_complete()
        self._check_frozen()
        self._failed = self._running = True
        self._begun = False
        try:
            self._backward(loss, scale, retain_graph)
        finally:
            self._running = False
        self.has_gradients, self._failed = True, False

    def _backward(self, loss: Tensor, scale: float, retain_graph: bool) -> None:
        raise NotImplementedError

    def _check_complete(self) -> None:
        if self._failed:
            raise RuntimeError(INCOMPLETE)

    def _check_frozen(self) -> None:
        if self.steps_parameters:
            return
        thawed = [name for name, param in self._frozen if param.requires_grad]
        if thawed:
            raise RuntimeError(
                f"{thawed[:10]} did not train when fabric.setup was called, and DeepSpeed's engine does not step them: "
                "call fabric.setup while they have requires_grad=True, with a learning rate of 0 until they train"
            )

    # ---------------------------------------------------------------- gradients

    def reduce(self) -> None:
        """Ends the accumulation: averages gradients over ranks, once per step."""
        self._check_complete()
        if not self._reduced:
            self.vendor.set_gradient_accumulation_boundary(True)
            self._reduce()
            self._reduced = True

    def _reduce(self) -> None:
        self.vendor.allreduce_gradients()

    def unscale(self) -> None:
        """Divides the gradients in `param.grad` by the loss scale; raises `RuntimeError` where they are not there."""
        raise RuntimeError(
            "fabric.unscale_gradients: at stages 1 to 3 DeepSpeed's engine holds gradients in shards and unscales them "
            "in its step. Clip with fabric.clip_gradients(model, optimizer, max_norm=...), read "
            "deepspeed.utils.safe_get_full_grad(param) / fabric.precision_plugin.scale, or pass stage=0"
        )

    def clip(self, clip: Clip) -> Tensor | None:
        """Clips the coming step; returns the unscaled norm of all gradients (float32) for `max_norm`, else None."""
        raise NotImplementedError

    # ---------------------------------------------------------------- the step

    def step(self) -> bool:
        """Steps, or discards non-finite gradients; returns whether the step was skipped."""
        self.reduce()
        skipped = self._step()
        self.has_gradients = self._reduced = False
        self.vendor.set_gradient_accumulation_boundary(False)
        return skipped

    def _step(self) -> bool:
        raise NotImplementedError

    def drop(self) -> None:
        """Discards all gradients since the last step, as `optimizer.zero_grad()` does."""
        if self.has_gradients or self._failed:
            self._drop()
            self.has_gradients = self._reduced = self._failed = False
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
        """Has DeepSpeed write its files to `folder / tag`, all ranks together."""
        self.vendor.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path) -> None:
        """Has DeepSpeed load the files in `folder`, all ranks together.

        Raises:
            CheckpointError: it finds none there.
        """
        found, _ = self.vendor.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
        if found is None:
            raise CheckpointError(f"DeepSpeed found no checkpoint in {folder}")
        self._loaded()

    def adopt(self, saved: Saved) -> Callable[[], None]:
        """Returns a function that loads values which another stage, or number of ranks, has saved.

        Nothing is changed until that is called, on all ranks together.

        Raises:
            CheckpointError: the values do not match this engine's model or optimizer.
        """
        differing = sorted(saved.keys() ^ self.module.state_dict().keys())
        if differing:
            raise CheckpointError(
                f"{saved.folder} and this {type(self.module).__name__} have different state dict keys: {differing[:10]}"
            )
        masters, states = fill(saved, self._flats(), self._fragments())

        def write() -> None:
            with torch.no_grad():
                self._write_module(saved)
                self._write_optimizer(masters, lambda base: saved.as_base(base, states))
            for name, count in saved.counts().items():
                setattr(self.vendor, name, count)
            self._loaded()

        return write

    def _flats(self) -> list[Tensor]:
        """Returns the tensors that the optimizer steps on this rank."""
        raise NotImplementedError

    def _fragments(self) -> Iterable[Fragment]:
        """Returns which parts of which parameters lie in them."""
        raise NotImplementedError

    def _write_module(self, saved: Saved) -> None:
        params = dict(self.module.named_parameters())
        for name in saved.trained:
            params[name].copy_(saved.master(name))
        self.module.load_state_dict(saved.rest(), strict=False)

    def _write_optimizer(self, masters: list[Tensor], as_base: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Writes master weights and state; `as_base` makes the state dict to load from the torch optimizer's own."""
        raise NotImplementedError

    def parameters_changed(self) -> None:
        """Copies parameters that were written from outside into the master weights."""

    def _loaded(self) -> None:
        """Resets what DeepSpeed's files hold of the step in which they were written."""

    def destroy(self) -> None:
        """Takes DeepSpeed's hooks off the module and its parameters."""
        self.vendor.destroy()


def tighten(limit: float, norm: Tensor, clip: Clip) -> tuple[float, Tensor]:
    """Returns the limit for the coming step, and the norm after the clipping to `limit` that was asked for before.

    A `limit` of 0.0 is none.

    Raises:
        RuntimeError: clipping by value after clipping by norm, which DeepSpeed does in its step.
    """
    if limit == 0.0:
        return clip.max_norm or 0.0, norm
    if clip.max_norm is None:
        raise RuntimeError("fabric.clip_gradients(clip_val=...) after max_norm=...: DeepSpeed clips by norm later, in "
                           "its step; clip by value first")  # fmt: skip
    return min(limit, clip.max_norm), norm.clamp(max=limit)


def check_finite(norm: Tensor, clip: Clip) -> None:
    """Raises `RuntimeError` for a norm that is not finite, if `clip` asks for that."""
    if clip.error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise RuntimeError(
            "clip_gradients(error_if_nonfinite=True): the norm of the gradients is non-finite, "
            f"{float(norm)}: look for NaN in the data or the loss [nonfinite-norm]"
        )
