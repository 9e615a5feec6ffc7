"""The loss scale of a DeepSpeed engine. The engine scales the loss, unscales gradients and skips steps.

EngineScaler    nothing is scaled; steps are counted
DynamicScaler   torch_autocast in float16: the scale is kept here, by torch's rule, since DeepSpeed's never falls
SectionScaler   the fp16 section: the scale is DeepSpeed's, by its rule (window, hysteresis, minimum)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.scaling import Clip, NameOf, Scaler

MAX_SKIPS = 50
"""FloatingPointError is raised after this many consecutive skipped steps."""

_ADVICE = (
    "Look for NaN in the data or the loss, with hooks that name the layer (the recipe nan.md in the docs); lower the "
    "learning rate"
)
_OR_BFLOAT16 = '; or use precision="bf16-mixed", which needs no scaling'
_ENGINES = "DeepSpeed's engine does that itself; call {0}"


class EngineScaler(Scaler):
    """Counts the engine's steps. Unscaling, clipping and stepping raise: the engine has the gradients."""

    def unscale(self, optimizer: Optimizer) -> None:
        """Raises `RuntimeError`: gradients are shards that the engine holds."""
        raise RuntimeError(
            _ENGINES.format(
                "fabric.unscale_gradients(optimizer) at stage 0; at other stages divide "
                "deepspeed.utils.safe_get_full_grad(param) by the scale"
            )
        )

    def clip(
        self, optimizer: Optimizer | None, params: list[nn.Parameter], clip: Clip, name_of: NameOf
    ) -> Tensor | None:
        """Raises `RuntimeError`: only the engine has all gradients."""
        raise RuntimeError(_ENGINES.format("fabric.clip_gradients(model, optimizer, max_norm=...)"))

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None, name_of: NameOf, **kwargs: Any) -> Any:
        """Raises `RuntimeError`: the engine steps the optimizer."""
        raise RuntimeError(_ENGINES.format("fabric.setup(model, optimizer), then optimizer.step(), or engine.step()"))

    def attach(self, vendor: Any) -> None:
        """Connects to a new engine; a state that was loaded before goes into its scale."""

    def stepped(self, skipped: bool) -> None:
        """Counts a step of the engine.

        Raises:
            FloatingPointError: MAX_SKIPS consecutive steps were skipped.
        """
        self.counter.add(skipped)
        if self.counter.skipped_in_a_row >= MAX_SKIPS:
            is_scaled = type(self) is not EngineScaler
            scale = f", the loss scale is {self.factor:g}" if is_scaled else ""
            raise FloatingPointError(
                f"{self.counter.skipped_in_a_row} optimizer steps in a row were skipped{scale}: inf or NaN in the "
                "gradients (of which parameters DeepSpeed does not say). "
                f"{_ADVICE}{_OR_BFLOAT16 * is_scaled} [no-finite-gradients]"
            )


class DynamicScaler(EngineScaler):
    """The scale halves on a skipped step and doubles after `growth_interval` good ones, as `torch.amp.GradScaler`'s.

    Args:
        init_scale, growth_factor, backoff_factor, growth_interval: as in torch.
        min_scale: the scale does not fall below this; default float16's smallest normal number.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        min_scale: float = 2.0**-14,
    ) -> None:
        super().__init__()
        self._state: dict[str, Any] = {
            "scale": float(init_scale),
            "growth_factor": float(growth_factor),
            "backoff_factor": float(backoff_factor),
            "growth_interval": growth_interval,
            "_growth_tracker": 0,
        }
        self._min_scale = min_scale
        _check(self._state)
        if not growth_factor > 1 or not 0 < backoff_factor < 1 or growth_interval < 1 or not init_scale > 0:
            raise ValueError(
                f"scaler={self._state}: expected init_scale > 0, growth_factor > 1, 0 < backoff_factor < 1, "
                "growth_interval >= 1"
            )

    @property
    def factor(self) -> float:
        """The factor of the loss."""
        scale: float = self._state["scale"]
        return scale

    def stepped(self, skipped: bool) -> None:
        """Counts a step of the engine and moves the scale; raises as the base class does."""
        state, scale = self._state, self.factor
        if skipped:
            state["scale"] = max(scale * state["backoff_factor"], min(scale, self._min_scale))
            state["_growth_tracker"] = 0
        else:
            state["_growth_tracker"] += 1
            if state["_growth_tracker"] == state["growth_interval"]:
                grown = scale * state["growth_factor"]
                state["scale"] = grown if grown < 2.0**128 else scale  # float32 holds no more
                state["_growth_tracker"] = 0
        super().stepped(skipped)

    def state_dict(self) -> dict[str, Any]:
        """Returns the same keys as torch's scaler, so that core's 16-mixed loads it, and the reverse."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; of SectionScaler's state the scale. Others raise `ValueError`."""
        known = {key: state[key] for key in self._state if key in state}
        _check(known)
        self._state.update(known)


class SectionScaler(EngineScaler):
    """The scale of the `fp16` section, which DeepSpeed updates; without an engine yet, the one it will start from."""

    _FIELDS: Mapping[str, str] = {
        "scale": "cur_scale",
        "iteration": "cur_iter",
        "last_overflow": "last_overflow_iter",
        "hysteresis": "cur_hysteresis",
    }

    def __init__(self) -> None:
        super().__init__()
        self._loaded: dict[str, Any] = {}
        self._vendor: Any = None

    def attach(self, vendor: Any) -> None:
        """Connects to the engine's scaler; a state that was loaded before goes into it."""
        self._vendor = vendor
        self._write(self._loaded)

    @property
    def _live(self) -> Any:
        """DeepSpeed's scaler, another object after it has loaded a checkpoint; None without an engine."""
        return None if self._vendor is None else self._vendor.optimizer.loss_scaler

    @property
    def factor(self) -> float:
        """The factor of the loss; 1.0 without an engine and a loaded state."""
        return float(self.state_dict().get("scale", 1.0))

    def state_dict(self) -> dict[str, Any]:
        """Returns scale, iteration, last overflow and hysteresis as far as the engine's scaler has them."""
        if self._live is None:
            return {"scale": 1.0, **self._loaded}
        return {key: getattr(self._live, name) for key, name in self._FIELDS.items() if hasattr(self._live, name)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; of DynamicScaler's state the scale. Others raise `ValueError`."""
        known = {key: state[key] for key in self._FIELDS if key in state}
        _check(known)
        self._loaded = known
        if self._live is not None:
            self._write(known)

    def _write(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            if hasattr(self._live, self._FIELDS[key]):
                setattr(self._live, self._FIELDS[key], value)


def _check(state: Mapping[str, Any]) -> None:
    for key, value in {"scale": None, **state}.items():
        if type(value) not in (int, float) or not math.isfinite(value) or (key == "scale" and value <= 0):
            raise ValueError(f"not the state of a loss scaler: {key} is {value!r}")
