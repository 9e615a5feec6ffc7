"""Subclasses of the vendor's layers with the state_dict keys of torch's, and a state that loads without pickle.

Importing this imports Transformer Engine, and constructing a `TELinear` needs a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn
from torch.nn.functional import pad

from precision_te.reference.amax import resized
from precision_te.vendor.microbatches import Kept

_COLUMNS = {"scaling_fwd": (slice(0, 2), 2), "scaling_bwd": (slice(2, 3), 1)}
"""Columns of our state, and how many of the vendor's they are: of input and weight, without the output; of the output's
gradient, without the input's."""


class _TorchsKeys:
    """Has no `_extra_state`, as there is nothing to save: the keys are torch's. It takes the vendor's empty one."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: Any) -> None:
        key = f"{prefix}_extra_state"
        extra = state_dict.get(key)
        if isinstance(extra, Tensor) and not extra.numel():
            state_dict = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)  # type: ignore[misc]


class TELayerNorm(_TorchsKeys, te.LayerNorm):
    """`transformer_engine.pytorch.LayerNorm` with torch's keys."""


class TERMSNorm(_TorchsKeys, te.RMSNorm):
    """`transformer_engine.pytorch.RMSNorm` with torch's keys."""


def _init_weight(weight: Tensor) -> Tensor:
    """Fills the weight as torch's linear layers do."""
    return nn.init.kaiming_uniform_(weight, a=5**0.5)


_INITS = {"weight": _init_weight}  # the others: zeros


class _Picklable(te.module.base.TransformerEngineBaseModule):
    """Has named functions to initialise parameters with; the vendor's local ones cannot be pickled, nor copied."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name, meta in self.param_init_meta.items():
            self.param_init_meta[name] = replace(meta, init_fn=_INITS.get(name, nn.init.zeros_))


class _Padded(_Picklable, te.Linear):
    """`transformer_engine.pytorch.Linear` for every shape, which keeps its weight in FP8 over microbatches.

    With `multiple` set, inputs and weights are padded with zeros to multiples of it, so that every shape works.
    """

    multiple: int | None = None
    kept: Kept

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kept = Kept()

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Takes (..., in_features) and returns (..., out_features)."""
        if is_first_microbatch is None and self._keeps():
            is_first_microbatch = self.kept.is_first_microbatch(self.weight)
        try:
            output = self._padded_forward(inp, is_first_microbatch, *args, **kwargs)
        except BaseException:
            self.kept.forget_quantized()
            raise
        if not self.fp8:  # it may have been the first one, and has quantised nothing
            self.kept.forget_quantized()
        return output

    def _keeps(self) -> bool:
        """Whether the weight is there from one forward to the next: FSDP2 frees it, and quantised ones need no copy."""
        return not self.is_fsdp2 and not self.primary_weights_in_fp8

    def _padded_forward(self, inp: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.multiple is None:
            return super().forward(inp, *args, **kwargs)
        rows = inp.reshape(-1, inp.shape[-1])
        padded = pad(rows, (0, -rows.shape[1] % self.multiple, 0, -rows.shape[0] % self.multiple))
        output = super().forward(padded, *args, **kwargs)
        return output[: rows.shape[0], : self.out_features].reshape(*inp.shape[:-1], self.out_features)

    def _get_weight_and_bias_tensors(self) -> tuple[Any, Any]:
        weight, bias = super()._get_weight_and_bias_tensors()
        if self.multiple is None:
            return weight, bias
        rows, columns = (-size % self.multiple for size in weight.shape)
        padded = self.kept.padded if self._keeps() else lambda _, tensor, more: pad(tensor, more)
        weight = padded("weight", weight, (0, columns, 0, rows))
        return weight, padded("bias", bias, (0, rows)) if self.use_bias else bias


class TELinear(_TorchsKeys, _Padded):
    """The vendor's with torch's keys, for recipes that have no state."""


class _DelayedState:
    """Scales and amax history of delayed scaling in `_extra_state`, always.

    It is one float32 tensor (1 + history, 3), the reference engine's: the scales, then the history, for input, weight
    and gradient of the output. The vendor's own is a pickle, which it refuses to load unless an environment variable
    says so, and of changing size, which torch.distributed.checkpoint cannot load into a new model.
    """

    fp8_meta: dict[str, Any]
    fp8_meta_tensors_initialized: bool
    history = 1024
    _loaded: Tensor | None = None  # until the layer's first forward allocates the state on the GPU

    def get_extra_state(self) -> Tensor:
        """Returns the state, before the first forward that of a new layer."""
        if self._loaded is not None:
            return self._loaded.clone()
        state = torch.zeros(1 + self.history, 3)
        state[0] = 1.0
        for key, (columns, used) in _COLUMNS.items():
            if key in self.fp8_meta:
                state[0, columns] = self.fp8_meta[key].scale[:used].detach().cpu()
                state[1:, columns] = self.fp8_meta[key].amax_history[:, :used].detach().cpu()
        return state

    def set_extra_state(self, state: Any) -> None:
        """Takes what `get_extra_state` returned, or the vendor's own, for which the vendor's conditions hold.

        A history of another length loses its oldest rows, or gets rows of zeros.

        Raises:
            ValueError: a float32 tensor of another shape.
        """
        if not isinstance(state, Tensor) or state.dtype is not torch.float32:
            super().set_extra_state(state)  # type: ignore[misc]
            return
        if state.dim() != 2 or len(state) < 2 or state.shape[1] != 3:
            raise ValueError(f"the state of delayed scaling is (1 + history, 3), and this is {tuple(state.shape)}")
        scale, history = state.detach().cpu().split([1, len(state) - 1])
        self._loaded = torch.cat([scale, resized(history, self.history)])
        if self.fp8_meta_tensors_initialized:
            self._use_loaded()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)  # type: ignore[misc]
        missing, *_ = lists
        if f"{prefix}_extra_state" in missing:  # a file of torch's layers
            missing.remove(f"{prefix}_extra_state")

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        super().init_fp8_meta_tensors(recipe)  # type: ignore[misc]
        if self._loaded is not None:
            self._use_loaded()

    def _use_loaded(self) -> None:
        state, self._loaded = self._loaded, None
        assert state is not None
        for key, (columns, used) in _COLUMNS.items():
            self.fp8_meta[key].scale[:used].copy_(state[0, columns])
            self.fp8_meta[key].amax_history[:, :used].copy_(state[1:, columns])


class TEDelayedLinear(_DelayedState, _Padded):
    """The vendor's for delayed scaling."""
