"""The layer that stands in the place of `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precision_te.recipes import Delayed
from precision_te.reference import region
from precision_te.reference.amax import AmaxState
from precision_te.reference.products import Scales, linear
from precision_te.reference.region import Region

STATE = "_extra_state"
"""Where in a state_dict delayed scaling's state is, float32 (1 + steps, 3); once there is one."""


class ReferenceLinear(nn.Linear):
    """`nn.Linear` whose three products are of quantised operands, inside of a region; outside it is torch's.

    x (..., in) -> (..., out), in autocast's dtype or that of x. Parameters and their names are those of the layer that
    it replaces. Under delayed scaling its state_dict has one tensor more from its first forward on, `STATE`; a
    state_dict without it loads too, and leaves the state as it is.
    """

    amax: AmaxState | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)
        self.amax = None
        self._last: tuple[Region, Tensor | None] | None = None

    @torch.compiler.disable(reason="precision-te's reference is not compiled")
    def forward(self, x: Tensor) -> Tensor:
        """Returns x W^T + bias; `torch.compile` breaks its graph here.

        Raises:
            ValueError: x does not have in_features columns, or has another dtype than the weight and no autocast.
        """
        again = torch._C._current_graph_task_id() != -1  # by backward: in the first time's region, with its scales
        within, scale = (self._last or (None, None)) if again else (region.current(), None)
        if within is None:
            self._last = None
            return F.linear(x, self.weight, self.bias)
        dtype = self._compute_dtype(x)
        rows = x.reshape(-1, self.in_features).to(dtype)
        scales = self._scales(within, within.recipe, rows, scale) if isinstance(within.recipe, Delayed) else None
        self._last = within, None if scales is None else scales.forward
        if within.calibrating:
            return F.linear(x, self.weight, self.bias)
        with torch.autocast(x.device.type, enabled=False):
            result = linear(rows, self.weight, self.bias, within.recipe, scales)
        return result.view(*x.shape[:-1], self.out_features)

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"{self}: the input, of shape {tuple(x.shape)}, does not have {self.in_features} columns")
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype is not torch.float64:
            return torch.get_autocast_dtype(device)
        if x.dtype is not self.weight.dtype:
            raise ValueError(f"{self}: the input is {x.dtype} and the weight {self.weight.dtype}")
        return x.dtype

    def _scales(self, within: Region, recipe: Delayed, rows: Tensor, scale: Tensor | None) -> Scales:
        """Returns the scales, and notes the largest values, unless `scale` is of a forward that runs again."""
        if self.amax is None:
            self.amax = AmaxState(recipe.amax_history_len, rows.device)
        self.amax.fit(recipe.amax_history_len, rows.device)
        if scale is None:
            self.amax.record("input", rows)
            self.amax.record("weight", self.weight)
            within.ran(self.amax)
            scale = self.amax.scale.clone()
        return Scales(within, self.amax, scale)

    # ---------------------------------------------------------------- state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.amax is not None:
            destination[prefix + STATE] = self.amax.tensor()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        state = own.pop(prefix + STATE, None)
        super()._load_from_state_dict(own, prefix, *args)
        is_empty = isinstance(state, Tensor) and not state.numel()  # of the vendor's layers: they had none
        if state is not None and not is_empty:
            try:
                self.amax = AmaxState.of(state, self.weight.device)
            except ValueError as error:
                args[-1].append(f"{prefix}{STATE}: {error}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the state along, and leaves its dtype; on the meta device it is gone, as values are."""
        move: Any = super()._apply
        result = move(fn, recurse)
        if self.weight.is_meta:
            self.amax = None
        elif self.amax is not None:
            self.amax.fit(len(self.amax.history), self.weight.device)
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # it may hold a process group, and is of a forward in this process

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{super().extra_repr()}, low precision inside of a region"
