"""The layer that replaces `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precision_te.recipes import Delayed
from precision_te.reference import recompute, region
from precision_te.reference.amax import AmaxState
from precision_te.reference.products import Scales, linear
from precision_te.reference.recompute import Run
from precision_te.reference.region import Region

STATE = "_extra_state"
"""Where in a state_dict delayed scaling's state is, float32 (1 + steps, 3); once there is one."""


class ReferenceLinear(nn.Linear):
    """`nn.Linear` whose three products are of quantised operands, inside of a region; outside it is torch's.

    x (..., in) -> (..., out), in autocast's dtype or that of x. Parameters and their names are those of the layer that
    it replaces. Under delayed scaling its state_dict has one tensor more from its first forward on, `STATE`; a
    state_dict without it loads too, and leaves the state as it is. torch.distributed.checkpoint loads only keys that
    the model has: run a new model once, without gradients, before it.
    """

    amax: AmaxState | None
    _runs: WeakSet[Run]  # whose graphs are there
    _last: Run | None  # without gradients

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)
        self.amax = None
        self._forget()

    @torch.compiler.disable(reason="precision-te's reference is not compiled")
    def forward(self, x: Tensor) -> Tensor:
        """Returns x W^T + bias; `torch.compile` breaks its graph here.

        Raises:
            ValueError: x does not have in_features columns, or has another dtype than the weight and no autocast.
        """
        run, first = recompute.taken(self), False
        if run is None and torch._C._current_graph_task_id() != -1:  # by backward
            run = recompute.pending(self._runs, self._last)
        if run is None:
            run, first = Run(region.current()), True
        recompute.note(self, run)
        within = run.region
        if within is None:
            return self._plain(x, run, first)
        dtype = self._compute_dtype(x)
        rows = x.reshape(-1, self.in_features).to(dtype)
        scales = self._scales(within, within.recipe, rows, run) if isinstance(within.recipe, Delayed) else None
        if within.calibrating:
            return self._plain(x, run, first)
        with torch.autocast(x.device.type, enabled=False):
            result = linear(rows, self.weight, self.bias, within.recipe, scales, run)
        self._remember(run, first, result)
        return result.view(*x.shape[:-1], self.out_features)

    def _plain(self, x: Tensor, run: Run, first: bool) -> Tensor:
        result = F.linear(x, self.weight, self.bias)
        if first and result.grad_fn is not None:
            notes: Any = result.grad_fn.metadata
            notes["precision_te"] = run  # which lives as long as the graph
        self._remember(run, first, result)
        return result

    def _remember(self, run: Run, first: bool, result: Tensor) -> None:
        """Keeps a run that backward may recompute."""
        if first and result.requires_grad:
            self._runs.add(run)
        elif first and (run.region is not None or self._last is None or self._last.done):
            self._last = run  # a reentrant checkpoint's, for all that is known here

    def _forget(self) -> None:
        self._last = None
        self._runs = WeakSet()

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"{self}: the input, of shape {tuple(x.shape)}, does not have {self.in_features} columns")
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype is not torch.float64:
            return torch.get_autocast_dtype(device)
        if x.dtype is not self.weight.dtype:
            raise ValueError(f"{self}: the input is {x.dtype} and the weight {self.weight.dtype}")
        return x.dtype

    def _scales(self, within: Region, recipe: Delayed, rows: Tensor, run: Run) -> Scales:
        """Returns the scales, and records amax, unless `run` is recomputed: then it has its scales already."""
        state = self.state(recipe)
        if run.scales is None:
            state.record("input", rows)
            state.record("weight", self.weight)
            within.ran(state)
            run.scales = state.scale.clone()
        return Scales(within, state, run.scales)

    def state(self, recipe: Delayed) -> AmaxState:
        """Returns delayed scaling's state, made now if need be, as long as `recipe` says."""
        if self.amax is None:
            self.amax = AmaxState(recipe.amax_history_len, self.weight.device)
        self.amax.resize(recipe.amax_history_len, self.weight.device)
        return self.amax

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
                loaded = AmaxState.of(state, self.weight.device)
            except ValueError as error:
                args[-1].append(f"{prefix}{STATE}: {error}")
            else:
                if self.amax is None:
                    self.amax = loaded
                else:  # the very object, which a backward to come may know
                    self.amax.scale, self.amax.history = loaded.scale, loaded.history

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the state along, and leaves its dtype; on the meta device it is gone, as values are."""
        move: Any = super()._apply
        result = move(fn, recurse)
        if self.weight.is_meta:
            self.amax = None
        elif self.amax is not None:
            self.amax.resize(len(self.amax.history), self.weight.device)
        return result

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_last"], state["_runs"]  # of forwards in this process, and they may hold a process group
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{super().extra_repr()}, low precision inside of a region"
