"""The engine of stages 1 and 2, whose optimizer steps this rank's part of flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.checkpoint import CheckpointError
from precision_core.scaling import Clip, all_finite
from precision_deepspeed.checkpoints import Fragment, Saved
from precision_deepspeed.engine import Engine, check_finite, tighten
from precision_deepspeed.order import Order


class ZeroEngine(Engine):
    """Stages 1 and 2, and what stage 3 shares with them."""

    def __init__(self, vendor: Any, module: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(vendor, module, optimizer)
        self._order: Order | None = None
        if vendor.zero_optimization_partition_gradients() and torch.distributed.get_world_size() > 1:
            self._order = Order(module, vendor.device)
            for name in ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload"):
                setattr(self._zero, name, self._order.checked_by(getattr(self._zero, name)))

    @property
    def _zero(self) -> Any:
        return self.vendor.optimizer

    def _before_forward(self) -> None:
        self._zero.clear_backward_seen_flag()

    def _backward(self, loss: Tensor, scale: float, retain_graph: bool) -> None:
        self._zero.clear_backward_seen_flag()  # else, at stage 3, a second backward after a forward replaces gradients
        if not self.has_gradients and self._zero.custom_loss_scaler:
            self._zero.external_loss_scale = scale  # and so it stays until these gradients are stepped
        self.vendor.backward(loss, retain_graph=retain_graph)

    def _reduce(self) -> None:
        if self.vendor.zero_optimization_partition_gradients():
            self._zero.finalize_gradient_accumulation_boundary()
        else:
            self._fill()
            self.vendor.allreduce_gradients()

    def _fill(self) -> None:
        """Fills in zeros for missing gradients: DeepSpeed reduces those that a rank has, in order, not by parameter."""
        for group in self._zero.bit16_groups:
            for param in group:
                if self._zero.get_gradient_for_reduction(param) is None:
                    param.grad = torch.zeros_like(param)
                    if self._zero.use_grad_accum_attribute:
                        param.grad_accum = param.grad.to(self._zero.gradient_accumulation_dtype)

    def clip(self, clip: Clip) -> Tensor | None:
        self.reduce()
        if clip.max_norm is None:
            tighten(self._zero.clip_grad, torch.zeros(()), clip)
            self._clip_values(clip)
            return None
        if clip.norm_type != 2.0:
            raise ValueError(
                f"clip_gradients(norm_type={clip.norm_type}): under ZeRO DeepSpeed clips by the 2-norm only; pass "
                "stage=0 for others"
            )
        parts = torch.stack([torch.as_tensor(part).float().reshape(()) for part in self._norms()])
        # DeepSpeed returns -1 for a norm that is not finite.
        norm = torch.linalg.vector_norm(torch.where(parts < 0, torch.inf, parts)) / self._zero.loss_scale
        check_finite(norm, clip)
        self._zero.clip_grad, norm = tighten(self._zero.clip_grad, norm, clip)
        return norm

    def _norms(self) -> list[Any]:
        return [self._zero.scaled_global_norm()]

    def _clip_values(self, clip: Clip) -> None:
        assert clip.clip_val is not None
        if self.vendor.zero_cpu_offload():
            raise ValueError(
                "clip_gradients(clip_val=...) with offload_optimizer: the gradients are in DeepSpeed's own buffers in "
                "CPU memory; pass max_norm"
            )
        gradients = [part for group in self._zero.averaged_gradients.values() for part in group or ()]
        if clip.error_if_nonfinite:
            check_finite(torch.stack([gradient.float().abs().sum() for gradient in gradients]).sum(), clip)
        limit = clip.clip_val * self._zero.loss_scale
        if all_finite(gradients):  # else inf or NaN stays, and the step is skipped
            for gradient in gradients:
                gradient.clamp_(-limit, limit)

    def _step(self) -> bool:
        if self._order is not None and not getattr(self._zero, "compute_grad_norm", True):
            self._order.check()
        self.vendor.step()
        self._zero.clip_grad = 0.0
        self._forget()
        return bool(self._zero.overflow)

    def _drop(self) -> None:
        """Discards gradients as DeepSpeed does in a step that it skips."""
        zero = self._zero
        zero.clip_grad = 0.0
        self._end_backward()
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        for index in zero.averaged_gradients:
            zero.averaged_gradients[index] = zero.all_grad_tensors[index] = None
        zero.all_grad_tensors.clear()
        self._forget()

    def _forget(self) -> None:
        """Clears this step's gradients: DeepSpeed steps them again if the next step leaves a parameter out (0.19.8)."""
        zero = self._zero
        if self._order is not None:
            self._order.forget()
        kept = [*self._kept_gradients()]
        if self.vendor.zero_cpu_offload():
            zero.reset_cpu_buffers()
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)  # to None: a skipped step keeps them
            kept += [flat.grad for flat in self._flats() if flat.grad is not None]
        for gradient in kept:
            gradient.zero_()

    def _kept_gradients(self) -> Iterable[Tensor]:
        """Returns the buffers in which DeepSpeed accumulates gradients, which it keeps from step to step."""
        return self._zero.accumulated_grads_in_cpu.values() if self.vendor.zero_cpu_offload() else ()

    def _end_backward(self) -> None:
        """Resets what DeepSpeed had begun of a backward that raised."""
        zero = self._zero
        if not self._failed:
            return
        zero._backward_active_depth = zero._remaining_grad_acc_hooks = 0
        zero.clear_backward_seen_flag()
        for param in self.module.parameters():
            param.grad = None
        for bucket in zero.ipg_buckets.values():
            getattr(bucket, "clear_params", bucket.clear)()  # stage 3 has the former, and keeps the buffer
        reduced = zero.params_already_reduced
        for key in reduced if isinstance(reduced, dict) else range(len(reduced)):
            reduced[key] = False

    def destroy(self) -> None:
        if self._order is not None:
            self._order.remove()
        super().destroy()

    def parameters_changed(self) -> None:
        self._zero.refresh_fp32_params()

    def _loaded(self) -> None:
        self._zero.clip_grad = 0.0  # in the files it is that of the step before

    def adopt(self, saved: Saved) -> Callable[[], None]:
        if self.vendor.zero_nvme_offload_optimizer():
            raise CheckpointError(
                f"{saved.folder} was written by another number of ranks or stage, which is not converted for "
                "optimizers on NVMe, whose state DeepSpeed alone reads and writes"
            )
        return super().adopt(saved)

    def _flats(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    def _fragments(self) -> Iterator[Fragment]:
        for name, param in self.module.named_parameters():
            mapping = getattr(param, "_hp_mapping", None)
            if mapping is not None:  # else it lies on other ranks
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Fragment(name, mapping.param_group_index, here.start, there.start, here.numel)

    _BASE, _MASTERS = "base_optimizer_state", "single_partition_of_fp32_groups"

    def _write_optimizer(self, masters: list[Tensor], as_base: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        shard = self._zero.state_dict()  # in the layout of this run, for DeepSpeed to load as its own
        shard |= {self._BASE: as_base(shard[self._BASE]), self._MASTERS: masters}
        shards = [shard] * torch.distributed.get_world_size()
        self._zero.load_state_dict(shards, load_optimizer_states=True, load_from_fp32_weights=True)
