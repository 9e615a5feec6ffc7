"""The engine of stages 1 and 2, whose optimizer steps this rank's part of flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.checkpoint import CheckpointError
from precision_core.scaling import Clip, all_finite
from precision_deepspeed.checkpoints import Place, Saved
from precision_deepspeed.engine import Engine, check_finite, tighten
from precision_deepspeed.order import Order


class ZeroEngine(Engine):
    """Stages 1 and 2."""

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
        self._zero.clear_backward_seen_flag()  # else a second one after one forward replaces gradients at stage 3
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
        """Gives zeros to parameters without gradients: DeepSpeed reduces what each rank has, one after the other."""
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
                f"clip_gradients(norm_type={clip.norm_type}): under ZeRO DeepSpeed knows the 2-norm only; pass stage=0 "
                "for others"
            )
        parts = torch.stack([torch.as_tensor(part).float().reshape(()) for part in self._norms()])
        # DeepSpeed says -1 for what is not finite.
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
                "clip_gradients(clip_val=...) with offload_optimizer: DeepSpeed keeps the gradients where it alone "
                "reaches them; pass max_norm"
            )
        gradients = [part for group in self._zero.averaged_gradients.values() for part in group or ()]
        if clip.error_if_nonfinite:
            check_finite(torch.stack([gradient.float().abs().sum() for gradient in gradients]).sum(), clip)
        limit = clip.clip_val * self._zero.loss_scale
        for gradient in gradients:
            if all_finite([gradient]):  # else it stays, for the step to be skipped
                gradient.clamp_(-limit, limit)

    def _step(self) -> bool:
        if self._order is not None and not getattr(self._zero, "compute_grad_norm", True):
            self._order.check()
        self.vendor.step()
        self._zero.clip_grad = 0.0
        self._forget()
        return bool(self._zero.overflow)

    def _drop(self) -> None:
        """Does what the vendor does with the gradients of a step that it skips."""
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
        """Ends what belongs to one step: DeepSpeed steps it again where the next leaves a parameter out (0.19.8)."""
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
        """Returns the tensors in which DeepSpeed accumulates gradients, step after step."""
        return self._zero.accumulated_grads_in_cpu.values() if self.vendor.zero_cpu_offload() else ()

    def _end_backward(self) -> None:
        """Ends a backward that raised in the middle, as far as DeepSpeed has begun it."""
        zero = self._zero
        if not self._failed:
            return
        zero._backward_active_depth = zero._remaining_grad_acc_hooks = 0
        zero.clear_backward_seen_flag()
        for param in self.module.parameters():
            param.grad = None
        for bucket in zero.ipg_buckets.values():
            getattr(bucket, "clear_params", bucket.clear)()  # at stage 3 the buffer stays
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
        self._zero.clip_grad = 0.0  # the files say what it was when they were written

    def adopt(self, saved: Saved) -> Callable[[], None]:
        if self.vendor.zero_nvme_offload_optimizer():
            raise CheckpointError(
                f"{saved.folder} was written by another number of ranks or stage, and this run has its optimizer on "
                "NVMe, where DeepSpeed alone reaches it"
            )
        return super().adopt(saved)

    def _flats(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    def _places(self) -> Iterator[Place]:
        for name, param in self.module.named_parameters():
            mapping = getattr(param, "_hp_mapping", None)
            if mapping is not None:  # else other ranks have it
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Place(name, mapping.param_group_index, here.start, there.start, here.numel)

    _BASE, _MASTERS = "base_optimizer_state", "single_partition_of_fp32_groups"

    def _write_optimizer(self, masters: list[Tensor], as_base: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        shard = self._zero.state_dict()  # in the layout of this run, for the vendor to load as if it had been saved so
        shard |= {self._BASE: as_base(shard[self._BASE]), self._MASTERS: masters}
        shards = [shard] * torch.distributed.get_world_size()
        self._zero.load_state_dict(shards, load_optimizer_states=True, load_from_fp32_weights=True)
