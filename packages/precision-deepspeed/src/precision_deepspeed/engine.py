"""One DeepSpeed engine, as a training loop needs it: backward as often as one likes, true gradients, then a step.

zero_engine.ZeroEngine      stages 1 and 2: gradients and float32 weights are shards of flat tensors
zero3_engine.Zero3Engine    stage 3: parameters too
plain_engine.PlainEngine    stage 0 over float32 parameters: everything is where torch has it
plain_engine.HalfEngine     stage 0 over bfloat16 parameters: the optimizer holds float32 copies

Every backward is an accumulating one to DeepSpeed; `reduce` ends the accumulation when somebody needs the gradients,
clipping or the step. So nothing depends on knowing in advance which backward is the last. DeepSpeed's own way to that,
`managed_gradient_accumulation: false`, reduces in its step alone, too late for clipping (tests/test_vendor.py).

DeepSpeed skips a step whose gradients are not finite before its scaler hears of it, so under ZeRO the scale of
`torch_autocast` never falls (0.19.8). Its documented way around is used: `override_loss_scale` says what the loss is
multiplied with, and the engine divides by that before it clips and steps.
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
from precision_deepspeed.checkpoints import Place, Saved, fill
from precision_deepspeed.direct import check_fills_no_gradients, on_gradients_of

T = TypeVar("T")

TWICE = (
    "fabric.backward after fabric.clip_gradients, or after a step that raised: the gradients were reduced over ranks "
    "already. Clip once, after the last backward before the step; optimizer.zero_grad() drops them"
)


FAILED = (
    "the last fabric.backward raised and left gradients of a part of the model: call optimizer.zero_grad(), which "
    "drops all since the last step, then go on"
)


class Engine:
    """What all stages share. Holds the vendor's engine of one model and one optimizer."""

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
        vendor.module_forward_pre_hook.remove()  # `forward` does what they do: with them no module can be pickled
        vendor.module_forward_post_hook.remove()

    # ---------------------------------------------------------------- forward and backward

    def forward(self, run: Callable[[], T]) -> T:
        """Returns what `run` does, a forward of the module: what the vendor's `engine.forward` does around it."""
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
        """Returns what one forward's outputs are watched by."""
        return self._arrived

    def _arrived(self, gradient: Tensor) -> Tensor:
        """Runs where a gradient reaches an output of the model, whoever called autograd."""
        if not self._running:
            self._check_direct(gradient)
        elif not self._begun:
            self._begun = True
            self.vendor._backward_prologue()
        return gradient

    def _check_direct(self, gradient: Tensor) -> None:
        """Raises `RuntimeError` for a call of autograd, not by `backward`, that this stage cannot run."""
        check_fills_no_gradients(self.module)

    def _before_forward(self) -> None:
        """Tells the vendor's optimizer of a new forward that trains."""

    def backward(self, loss: Tensor, scale: float, retain_graph: bool) -> None:
        """Adds the gradients of `loss` (one number), times `scale` where the mode's scale is not the engine's own."""
        if self._reduced:
            raise RuntimeError(TWICE)
        self._check_whole()
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

    def _check_whole(self) -> None:
        if self._failed:
            raise RuntimeError(FAILED)

    def _check_frozen(self) -> None:
        if self.steps_parameters:
            return
        thawed = [name for name, param in self._frozen if param.requires_grad]
        if thawed:
            raise RuntimeError(
                f"{thawed[:10]} did not train when fabric.setup was called, and DeepSpeed's engine steps what did: set "
                "them up with requires_grad=True and a learning rate of 0, or set a new Fabric up"
            )

    # ---------------------------------------------------------------- gradients

    def reduce(self) -> None:
        """Ends the accumulation: gradients are averaged over ranks, once until the step."""
        self._check_whole()
        if not self._reduced:
            self.vendor.set_gradient_accumulation_boundary(True)
            self._reduce()
            self._reduced = True

    def _reduce(self) -> None:
        self.vendor.allreduce_gradients()

    def unscale(self) -> None:
        """Makes the gradients in `param.grad` true, where they are there."""
        raise RuntimeError(
            "fabric.unscale_gradients: at stages 1 to 3 DeepSpeed's engine holds gradients in shards and unscales them "
            "in its step. Clip with fabric.clip_gradients(model, optimizer, max_norm=...), read "
            "deepspeed.utils.safe_get_full_grad(param), which fabric.precision_plugin.scale divides, or pass stage=0"
        )

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

    def adopt(self, saved: Saved) -> Callable[[], None]:
        """Returns what brings the engine to the values that another stage, or number of ranks, has saved.

        Nothing is changed before that is called, on all ranks together.

        Raises:
            CheckpointError: the values have no place in this engine.
        """
        differing = sorted(saved.keys() ^ self.module.state_dict().keys())
        if differing:
            raise CheckpointError(f"{saved.folder} and this {type(self.module).__name__} differ in {differing[:10]}")
        masters, states = fill(saved, self._flats(), self._places())

        def write() -> None:
            with torch.no_grad():
                self._write_module(saved)
                self._write_optimizer(masters, lambda base: saved.as_base(base, states))
            for name, count in saved.counts().items():
                setattr(self.vendor, name, count)
            self._loaded()

        return write

    def _flats(self) -> list[Tensor]:
        """Returns what the optimizer steps on this rank."""
        raise NotImplementedError

    def _places(self) -> Iterable[Place]:
        """Returns where the parameters lie in it."""
        raise NotImplementedError

    def _write_module(self, saved: Saved) -> None:
        params = dict(self.module.named_parameters())
        for name in saved.trained:
            params[name].copy_(saved.master(name))
        self.module.load_state_dict(saved.rest(), strict=False)

    def _write_optimizer(self, masters: list[Tensor], as_base: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Writes master weights and state; `as_base` makes a state dict of torch's optimizer into that to load."""
        raise NotImplementedError

    def parameters_changed(self) -> None:
        """Brings master weights to what somebody wrote to the parameters."""

    def _loaded(self) -> None:
        """Brings what is not the vendor's to what was loaded."""

    def destroy(self) -> None:
        """Takes DeepSpeed's hooks off the module and its parameters."""
        self.vendor.destroy()


def tighten(limit: float, norm: Tensor, clip: Clip) -> tuple[float, Tensor]:
    """Returns the limit of the coming step and the norm as it is, where `limit` was set before; 0.0: none was.

    Raises:
        RuntimeError: gradients are to be clipped by value after their norm was: the engine does that in the step.
    """
    if limit == 0.0:
        return clip.max_norm or 0.0, norm
    if clip.max_norm is None:
        raise RuntimeError("fabric.clip_gradients(clip_val=...) after max_norm: DeepSpeed clips the norm in the step, "
                           "so clip by value first")  # fmt: skip
    return min(limit, clip.max_norm), norm.clamp(max=limit)


def check_finite(norm: Tensor, clip: Clip) -> None:
    if clip.error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise RuntimeError(f"clip_gradients(error_if_nonfinite=True): the norm of the gradients is {float(norm)}")
