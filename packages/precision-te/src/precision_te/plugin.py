"""The plugin: an engine's layers in FP8 or narrower, everything else as a base mode of core's has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from precision_core import Policy, Report
from precision_core.hardware import is_available
from precision_core.policy import parse_dtype
from precision_core.precision import Wrapping, hidden_parameters, make_plugin, module_bytes
from precision_core.support import base_of
from precision_core.surgery import Surgery
from precision_te.checks import check_base, check_counts, check_engine, check_flags, check_layers, name_patterns
from precision_te.convert import convert
from precision_te.coverage import notes
from precision_te.engine import Engine
from precision_te.nested import Nested
from precision_te.quantized import is_quantized
from precision_te.recipes import recipe_from
from precision_te.reference.engine import ReferenceEngine
from precision_te.vendor.engine import TransformerEngine
from precision_te.vendor.recipes import vendor_recipe

if TYPE_CHECKING:
    from precision_core import Strategy

MODES: dict[str, dict[str, str]] = {
    "transformer-engine": {"engine": "te"},
    "fp8-reference": {"engine": "reference", "recipe": "delayed"},
    "fp8-current-reference": {"engine": "reference", "recipe": "current"},
    "mxfp8-reference": {"engine": "reference", "recipe": "mxfp8"},
    "nvfp4-reference": {"engine": "reference", "recipe": "nvfp4"},
}
"""The modes by name, over bf16-mixed: what they mean to `TransformerEnginePrecision`."""

ENGINES = ("te", "reference")


def from_mode(mode: str, **options: Any) -> TransformerEnginePrecision:
    """Returns the plugin of one of `MODES`; its exceptions ("fp8-reference; lm_head: 32-true") are the base mode's."""
    base = base_of(mode)
    return TransformerEnginePrecision(f"bf16-mixed{mode.strip()[len(base) :]}", **MODES[base] | options)


class TransformerEnginePrecision(Wrapping):
    """Linear layers in FP8 or narrower, through NVIDIA Transformer Engine or a reference in plain torch.

    Args:
        precision: the base mode, of everything around those layers: parameters, autocast, the loss scaler. Modules that
            its exceptions name are left to it.
        replace_layers: convert torch's layers; False: the model has layers of the engine's already, which are kept.
        fp8_format: "hybrid" (e4m3 forward, e5m2 for gradients), "e4m3", "e5m2" (reference only), in any case, or the
            vendor's `Format`.
        recipe: how values are scaled: "delayed" (None means that), "current", "block", "mxfp8", "nvfp4"; a dict as
            {"recipe": "delayed", "amax_history_len": 16}; one of `precision_te.recipes`; the vendor's object.
        weights_dtype: the dtype of parameters; None: as the base mode says.
        fallback_compute_dtype: the dtype in which everything else computes; None: as the base mode says.
        exclude: name patterns of modules that stay as they are, as {"lm_head", "blocks.0"}.
        engine: "te", which needs the vendor's library and a GPU, or "reference", which is slow and runs anywhere.
        keep_first: so many of the first linear layers that could be converted stay; likewise `keep_last`.
        pad: te: pad shapes that FP8 cannot take with zeros, instead of leaving such layers alone.
        quantized_weights: te: linear weights are stored quantised alone, without their float values.

    Raises:
        ValueError: an unknown mode, format, recipe or engine, a contradiction between them, a dtype that no base mode
            has.
    """

    def __init__(
        self,
        precision: str | int | Policy = "16-mixed",
        replace_layers: bool = True,
        fp8_format: Any = "hybrid",
        *,
        recipe: Any = None,
        weights_dtype: torch.dtype | str | None = None,
        fallback_compute_dtype: torch.dtype | str | None = None,
        exclude: str | Iterable[str] = (),
        engine: str = "te",
        keep_first: int = 0,
        keep_last: int = 0,
        pad: bool = False,
        quantized_weights: bool = False,
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"TransformerEnginePrecision(engine={engine!r}): expected one of {', '.join(ENGINES)}")
        check_base(precision, MODES)
        options = {"pad": pad, "quantized_weights": quantized_weights}
        check_flags(replace_layers=replace_layers, **options)
        check_counts(keep_first=keep_first, keep_last=keep_last)
        self.recipe = recipe_from(recipe, fp8_format)
        self._given = recipe if type(recipe).__module__.startswith("transformer_engine.") else None
        check_engine(engine, self.recipe, self._given, **options)
        self._replace = replace_layers
        self._keep = {"keep_first": keep_first, "keep_last": keep_last}
        self._quantized = quantized_weights
        self._engine = self._make_engine(engine, pad)
        self._strategy: Strategy | None = None
        self._calibrating = False
        policy = _combined(Policy.parse(precision), weights_dtype, fallback_compute_dtype)
        self._device_type = "cuda" if engine == "te" or is_available("cuda") else "cpu"
        self.wrapped = make_plugin(policy, self._device_type)
        self.policy = policy
        self._stays = (*name_patterns(exclude), *(pattern for pattern, _ in policy.exceptions))

    def _make_engine(self, engine: str, pad: bool) -> Engine:
        if engine == "te":
            return TransformerEngine(self._given, pad=pad, quantized_weights=self._quantized)
        return ReferenceEngine()

    # ---------------------------------------------------------------- settings

    @property
    def mode(self) -> str:
        """What users ask for it by: "transformer-engine", or the reference's mode of the recipe."""
        wanted = {"engine": self.engine} | ({"recipe": self.recipe.name} if self.engine != "te" else {})
        name = next((name for name, options in MODES.items() if options == wanted), f"fp8-{self.recipe.name}-reference")
        return "; ".join([name, *(f"{pattern}: {policy}" for pattern, policy in self.policy.exceptions)])

    @property
    def engine(self) -> str:
        """Who computes: "te" or "reference"."""
        return self._engine.name

    def setup_fp8_recipe(self) -> Any:
        """Returns the recipe as the vendor's object, `DelayedScaling` unless another was asked for.

        It needs `transformer_engine.common.recipe` alone, which is there without a GPU.

        Raises:
            ImportError: the library is missing; says what to install.
        """
        if isinstance(self._engine, TransformerEngine):
            return self._engine.vendor_recipe(self.recipe)
        return self._given or vendor_recipe(self.recipe)

    # ---------------------------------------------------------------- set-up

    def refuses(self, strategy: Strategy) -> str | None:
        """Returns why it cannot run under `strategy`: no library, no GPU, a GPU without the recipe, base's reason."""
        try:
            self._engine.check(self.recipe)
        except (ImportError, ValueError) as error:
            return str(error)
        device_type = strategy.device.type
        if self.engine == "te" and device_type != "cuda":
            return (
                f"Transformer Engine computes on NVIDIA GPUs, not on {device_type!r}: pass accelerator='gpu', or a "
                "mode that ends in -reference"
            )
        return make_plugin(self.policy, device_type).refuses(strategy)

    def connect(self, strategy: Strategy) -> None:
        """Takes the device, and the processes over whom delayed scaling takes the largest values."""
        self._strategy = strategy
        self._use(strategy.device.type)
        super().connect(strategy)

    def storage(self, param: nn.Parameter) -> torch.dtype | None:
        """Returns base's answer; None for quantised weights, which no cast may touch."""
        return None if is_quantized(param) else super().storage(param)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Replaces the layers in place, casts as `base` says, and returns the module.

        A model whose layers are the engine's already is taken as it is, with what was added since.

        Raises:
            ImportError: engine te, without the library; says what to install.
            ValueError: the recipe cannot run here; nothing to convert; patterns that match nothing; what base refuses;
                converted layers that this plugin would not have converted, or another engine's.
        """
        self._engine.check(self.recipe)
        before = module_bytes(module)
        there = [(name, layer) for name, layer in module.named_modules() if self._engine.is_layer(layer)]
        self._check(module, there)
        self._follow(module)
        with hidden_parameters(module, is_quantized):
            self.wrapped.convert_module(module)
        rest = self.wrapped.report
        if self._replace:
            surgery = self._convert(module)
            module, done = surgery.module, surgery.report
        else:
            done = Report(self.mode)
        self.report = Report(
            self.mode,
            converted=done.converted + rest.converted,
            skipped=done.skipped + rest.skipped,
            notes=(*notes(module, self._engine, self.recipe, len(there)), *done.notes, *rest.notes),
            bytes_before=before,
            bytes_after=module_bytes(module),
        )
        self.remember(module)
        self._engine.register(module)
        return module

    def _convert(self, module: nn.Module, dry_run: bool = False) -> Surgery:
        return convert(
            module,
            self._engine,
            self.recipe,
            exclude=self._stays,
            packs=self._quantized,
            dry_run=dry_run,
            **self._keep,
        )

    def _check(self, module: nn.Module, there: list[tuple[str, nn.Module]]) -> None:
        """Raises `ValueError`, before anything is changed, for layers that are there and for having none to convert."""
        check_layers(module, self._engine, self.recipe, self._stays)
        kind = type(module).__name__
        if not self._replace and not there:
            raise ValueError(
                f"{self.mode}: replace_layers=False keeps the engine's layers, and this {kind} has none: leave it out"
            )
        planned = self._convert(module, dry_run=True).report if self._replace else Report(self.mode)
        if not there and not planned.converted:
            skipped = "; ".join(f"{name}: {reason}" for name, reason in planned.skipped[:10])
            layers = ", ".join(layer.__name__ for layer in self._engine.layers)
            raise ValueError(
                f"{self.mode}: this {kind} has no layer to convert. {layers} are; left alone: {skipped or 'none'}"
                " [nothing-to-convert]"
            )

    def _follow(self, module: nn.Module) -> None:
        """Takes the device of the module, where no strategy has said one."""
        if self._strategy is None and self.engine != "te":
            self._use(next((p.device.type for p in module.parameters() if not p.is_meta), self._device_type))

    def _use(self, device_type: str) -> None:
        if device_type != self._device_type:
            counts = self.wrapped.scaler.counter.state_dict()
            self._device_type, self.wrapped = device_type, make_plugin(self.policy, device_type)
            self.wrapped.scaler.counter.load_state_dict(counts)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Context in which parameters have base's dtype; with `quantized_weights` the vendor's layers store them so."""
        context = super().module_init_context()
        if self._quantized and isinstance(self._engine, TransformerEngine):
            return Nested(context, self._engine.weights_context(self.recipe))
        return context

    # ---------------------------------------------------------------- forward

    def forward_context(self) -> AbstractContextManager[Any]:
        """Context in which forward runs: the engine's, inside of base's."""
        engines = self._engine.context(self.recipe, group=self._group(), calibrating=self._calibrating)
        return Nested(super().forward_context(), engines)

    def accumulation_context(self, enabled: bool) -> AbstractContextManager[Any]:
        """Context of `fabric.no_backward_sync`: in it the vendor's layers are told which microbatch is the first."""
        return self._engine.accumulation_context() if enabled else super().accumulation_context(enabled)

    def _group(self) -> dist.ProcessGroup | None:
        """Returns the processes over whom delayed scaling takes the largest values: all that train the model."""
        several = self._strategy is None or self._strategy.group.world_size > 1
        return dist.group.WORLD if several and dist.is_available() and dist.is_initialized() else None

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Context in which forwards compute in the base mode, and delayed scaling notes the largest values."""
        before, self._calibrating = self._calibrating, True
        try:
            yield
        finally:
            self._calibrating = before

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns `function(*args, **kwargs)`, to be computed again in backward, with the scales of the first time.

        In place of `torch.utils.checkpoint.checkpoint`, which would compute outside of the engine's context.
        """
        return self._engine.checkpoint(function, *args, **kwargs)


def _combined(policy: Policy, params: Any, compute: Any) -> Policy:
    """Returns the base mode with these dtypes of parameters and computation; None leaves the mode's."""
    if params is None and compute is None:
        return policy
    params = policy.params if params is None else parse_dtype(params)
    compute = (policy.compute if policy.mixed else params) if compute is None else parse_dtype(compute)
    return Policy(params, compute, exceptions=policy.exceptions)
