"""The plugin: linear layers quantised by bitsandbytes, everything else in one of core's modes, the base."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from precision_bnb import fast
from precision_bnb.adopt import how_to_ask_for
from precision_bnb.config import COMPUTE_DTYPES, BitsAndBytesConfig
from precision_bnb.convert import adopt_raw, check_embeddings, converted, format_of, quantize
from precision_bnb.layers import Quantized, QuantizedEmbedding, QuantizedLinear
from precision_bnb.meta import parameters_on_meta
from precision_bnb.params import is_packed
from precision_bnb.quantizing import make_codes
from precision_bnb.share import left_out, quantised_share
from precision_bnb.support import DEVICES, compute_dtype
from precision_core import HalfPrecision, MixedPrecision, Policy, Precision, Report
from precision_core.hardware import is_available
from precision_core.policy import check_pattern, listed
from precision_core.precision import Item, Wrapping, cast_parameters, hidden_parameters, make_plugin, module_bytes
from precision_core.surgery import Surgery

if TYPE_CHECKING:
    from precision_core import Strategy

_DEFAULT_BASES = {  # compute dtype -> the base where something trains, which is float32 then, and where nothing does
    torch.float32: ("32-true", "32-true"),
    torch.bfloat16: ("bf16-mixed", "bf16-true"),
    torch.float16: ("16-mixed", "16-true"),
}


class _Half(HalfPrecision):
    """Core's plugin; its warning about rounded buffers names this plugin's argument."""

    def how_to_keep_buffers(self) -> str:
        return f'BitsandbytesPrecision(base="{replace(self.policy, buffers=torch.float32)}")'


class BitsandbytesPrecision(Wrapping):
    """Quantises linear layers to 4 or 8 bits and freezes them (int8-training's train); `base` is the mode of all else.

    Args:
        mode: "nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training", or a config: ours, transformers', a dict.
        dtype: what quantised layers compute in: float32, bfloat16 or float16. None: as the config says, else what the
            device computes fast.
        ignore_modules: name patterns of modules that are not quantised ({"lm_head", "*.mlp"}). None: as the config
            says, else the heads that `precision_bnb.convert.IGNORED` names.
        base: the mode of norms, heads, embeddings and adapters. None: what trains is float32, and the base is
            "bf16-mixed", "16-mixed" or "32-true" by the compute dtype; where nothing trains, "bf16-true" or "16-true".
        embeddings: whether `nn.Embedding` is quantised, too.

    Raises:
        ValueError: an unknown mode, a contradictory config, a dtype that layers cannot compute in, invalid patterns,
            `embeddings` with int8-training.
    """

    def __init__(
        self,
        mode: Any,
        dtype: torch.dtype | None = None,
        ignore_modules: set[str] | Iterable[str] | None = None,
        *,
        base: str | int | Policy | None = None,
        embeddings: bool = False,
    ) -> None:
        config = BitsAndBytesConfig.of(mode)
        if dtype is not None:
            if dtype not in COMPUTE_DTYPES:
                allowed = ", ".join(map(str, COMPUTE_DTYPES))
                raise ValueError(f"BitsandbytesPrecision(dtype={dtype!r}): layers compute in one of {allowed}")
            config = replace(config, bnb_4bit_compute_dtype=dtype)
        fast.check(config)
        check_embeddings(config, embeddings)
        self._config = config
        self._ignored = _checked(ignore_modules)
        self._embeddings = embeddings
        self._given_base = None if base is None else Policy.parse(base)
        self._strategy: Strategy | None = None
        self._device_type = "cuda" if is_available("cuda") else "cpu"
        self.wrapped = self._make_base(self._device_type, trains=True)
        self.policy = self.wrapped.policy

    @cached_property
    def _prepared(self) -> WeakKeyDictionary[nn.Module, Report]:
        """What `before_load` quantised; created on first use, so that a new plugin pickles."""
        return WeakKeyDictionary()

    # ---------------------------------------------------------------- settings

    @property
    def mode(self) -> str:
        """The mode's name; for a config, that of the mode that it is a variant of."""
        return self._config.mode

    def setup_bnb_config(self) -> BitsAndBytesConfig:
        """Returns the settings in use, with the compute dtype filled in."""
        return replace(self._config, bnb_4bit_compute_dtype=self._compute_dtype(self._device_type))

    def _compute_dtype(self, device_type: str) -> torch.dtype:
        if self._config.fast_inference:
            return torch.bfloat16
        return self._config.bnb_4bit_compute_dtype or compute_dtype(device_type)

    @property
    def _device(self) -> torch.device | None:
        """Where the model will live; None outside of Fabric."""
        return None if self._strategy is None else self._strategy.device

    def _make_base(self, device_type: str, trains: bool) -> Precision:
        """Returns the plugin for what is not quantised, by the compute dtype where no `base` was given."""
        dtype = self._compute_dtype(device_type)
        mixed, true = _DEFAULT_BASES[dtype]
        policy = self._given_base or Policy.parse(mixed if trains else true)
        if policy.mixed:  # a model may come in the dtype of its file, or have been cast before adapters were added
            return MixedPrecision(policy, device=device_type, upcast=True)
        is_half = not policy.mixed and policy.params in (torch.float16, torch.bfloat16)
        return _Half(policy) if is_half else make_plugin(policy, device_type)

    def _set_base(self, base: Precision) -> None:
        base.scaler.counter.load_state_dict(self.wrapped.scaler.counter.state_dict())
        if self._strategy is not None:
            base.connect(self._strategy)
        self.wrapped, self.policy = base, base.policy

    # ---------------------------------------------------------------- set-up

    def refuses(self, strategy: Strategy) -> str | None:
        """Returns why this cannot run under `strategy`, a device without kernels or the base's reason; None: it can."""
        device_type = strategy.device.type
        if device_type not in DEVICES:
            return f"bitsandbytes has kernels for {', '.join(DEVICES)}, not for {device_type!r}: use bf16-mixed there"
        if self._config.fast_inference and device_type != "cpu":
            return "fast_inference is the CPU's kernel: leave it out"
        return self._make_base(device_type, trains=True).refuses(strategy)

    def connect(self, strategy: Strategy) -> None:
        """Remembers the strategy; its device chooses the compute dtype and the base unless they were given."""
        self._strategy = strategy
        if strategy.device.type != self._device_type:
            self._device_type = strategy.device.type
            self._set_base(self._make_base(self._device_type, trains=True))
        else:
            super().connect(strategy)

    def storage(self, param: nn.Parameter) -> torch.dtype | None:
        """Returns the dtype that the base stores `param` in; None for packed weights, which are never cast."""
        return None if is_packed(param) else super().storage(param)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Quantises the layers, one after another and in place, casts the rest as `base` says, and returns the module.

        A model that is quantised already keeps its layers, and may have got adapters since; layers of bitsandbytes' own
        are converted.

        Raises:
            TypeError: `module` is not an `nn.Module`.
            ValueError: nothing to quantise; what `precision_bnb.quantize` raises for; a model quantised in another
                mode; parameters that train under `base="16-true"`, by name.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"convert_module expects an nn.Module, and was given a {type(module).__name__}")
        before = module_bytes(module)
        notes: tuple[str, ...] = ()
        report = Report(self.mode)
        if any(True for _ in converted(module)):
            self._check_adopted(module)
            self._check_trainable(module, self._adopt_raw(module, dry_run=True).report)
            raw = self._adopt_raw(module).report
            prepared = self._prepared.pop(module, None)
            if prepared is None:
                report, notes = raw, ("it was quantised before, and was taken over as it is",)
            else:
                report, before = prepared, prepared.bytes_before
        else:
            self._check_trainable(module, self._quantize(module, dry_run=True).report)
            surgery = self._quantize(module)
            module, report = surgery.module, surgery.report
        models = (module, *self.models)  # a frozen one takes the scaler from none that trains
        self._choose_base(trains=any(param.requires_grad for model in models for param in model.parameters()))
        self._set_up_layers(module)
        vectors = [item for model in models if self.policy.mixed for item in self._widen_vectors(model)]
        with hidden_parameters(module, is_packed):
            self.wrapped.convert_module(module)
        rest, experts = self.wrapped.report, left_out(module)
        self.report = Report(
            self.mode,
            converted=(*report.converted, *vectors, *rest.converted),
            skipped=(*experts, *report.skipped, *rest.skipped),
            notes=notes + report.notes + (rest.notes if self._given_base is not None else ()),
            bytes_before=before,
            bytes_after=module_bytes(module),
            lead=quantised_share(module),
        )
        self._mark(module)
        self.remember(module)
        return module

    def before_load(self, module: nn.Module) -> None:
        """Quantises a model that was built in `module_init_context` while it has no values: a file is to fill it."""
        if any(True for _ in converted(module)):
            self._set_devices(module)
            return
        planned = [item.name for item in self._surgery(module, dry_run=True).report.converted]
        if planned and planned != ["(root)"]:  # which has no parent to be replaced in: `setup` does it
            self._prepared[module] = self._surgery(module).report
            self._set_devices(module)
            self._mark(module)

    def _mark(self, module: nn.Module) -> None:
        """Tells transformers' models that they are quantised, as transformers' own quantiser would."""
        if "transformers.modeling_utils" in sys.modules and not self._config.llm_int8_has_fp16_weight:
            import_module("precision_bnb.huggingface").mark(module, self.setup_bnb_config())

    def _surgery(self, module: nn.Module, dry_run: bool = False) -> Surgery:
        dtype = self._compute_dtype(self._device_type)
        options: dict[str, Any] = {"embeddings": self._embeddings, "device": self._device, "dry_run": dry_run}
        return quantize(module, self._config, dtype, self._ignored, **options)

    def _adopt_raw(self, module: nn.Module, dry_run: bool = False) -> Surgery:
        dtype = self._compute_dtype(self._device_type)
        return adopt_raw(module, self._config, dtype, self._ignored, device=self._device, dry_run=dry_run)

    def _quantize(self, module: nn.Module, dry_run: bool = False) -> Surgery:
        surgery = self._surgery(module, dry_run)
        if not surgery.report.converted:
            skipped = "; ".join(f"{name}: {reason}" for name, reason in surgery.report.skipped[:10])
            derived = any("a subclass of Linear" in reason for _, reason in surgery.report.skipped)
            raise ValueError(
                f"{self.mode}: this {type(module).__name__} has no layer to quantise. Linear layers are"
                f"{', and embeddings' if self._embeddings else ''}; left alone: {skipped or 'none'}"
                f"{'. To quantise a subclass, put nn.Linear in its place' * derived} [nothing-to-convert]"
            )
        return surgery

    def _check_adopted(self, module: nn.Module) -> None:
        wanted = format_of(self._config)
        for name, layer in converted(module):
            format = layer.format if isinstance(layer, Quantized) else None
            if format != wanted:
                theirs = "int8-training" if format is None else format
                how = 'pass precision="int8-training"' if format is None else how_to_ask_for(format)
                raise ValueError(
                    f'{name or "the model"} is quantised in {theirs}: {how}, or dequantise it first, "{self.mode}" '
                    f"{f'({wanted}) ' if wanted is not None else ''}would not change it"
                )

    def _check_trainable(self, module: nn.Module, planned: Report | None = None) -> None:
        """Raises `ValueError` for parameters that train, once what is planned is done, where base was given as half."""
        if self._given_base is None or self._given_base.params is not torch.float16 or self._given_base.scale:
            return
        freezes = planned is not None and self.mode != "int8-training"
        frozen = {f"{item.name}.weight" for item in planned.converted} if planned is not None and freezes else set()
        trainable = [name for name, param in module.named_parameters() if param.requires_grad and name not in frozen]
        if not trainable:
            return
        raise ValueError(
            f'BitsandbytesPrecision(base="{self._given_base}") has float16 parameters, whose gradients overflow or '
            f'vanish, and these train: {listed(trainable)}. Pass base="16-mixed" or base="16-master", leave base out, '
            "or freeze them with requires_grad_(False)"
        )

    def _choose_base(self, trains: bool) -> None:
        """Sets the default base: half parameters only where nothing trains."""
        wanted = self._make_base(self._device_type, trains)
        if wanted.policy != self.policy:
            self._set_base(wanted)

    def _widen_vectors(self, module: nn.Module) -> list[Item]:
        """Casts half vectors that were frozen to base's dtype: torch's norms take no half weight with a float32 input.

        Such come from files, and from a time when nothing trained yet.
        """

        def wide(_: str, param: nn.Parameter) -> torch.dtype | None:
            is_half = param.dim() < 2 and param.dtype in (torch.float16, torch.bfloat16)
            return self.policy.params if is_half and self.storage(param) is not None else None

        return cast_parameters(module, wide)

    def _set_devices(self, module: nn.Module) -> None:
        """Tells layers where to quantise what they load, and makes their tables there: engines may move the weights."""
        for _, layer in converted(module):
            if isinstance(layer, Quantized):
                layer.forget()
                layer.quantizes_on = self._device
                make_codes(layer.format, self._device or layer.weight.device)

    def _set_up_layers(self, module: nn.Module) -> None:
        """Brings layers that were quantised by others, or before, to the settings of now."""
        self._set_devices(module)
        for name, layer in converted(module):
            layer.shown = f"{type(layer).__name__}{f' {name!r}' * bool(name)}"
            # What base's own embeddings would return; linear layers return what they are given.
            is_embedding = isinstance(layer, QuantizedEmbedding)
            layer.compute_dtype = self.policy.params if is_embedding else self._compute_dtype(self._device_type)
            if not is_embedding:
                layer.threshold = float(self._config.llm_int8_threshold)
            if isinstance(layer, QuantizedLinear):
                layer.fast_inference = self._config.fast_inference

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Context in which parameters are created on the meta device; `fabric.load_module` fills and quantises them.

        Buffers are real, and keep the dtype in which the module computes them.
        """
        return parameters_on_meta()


def _checked(patterns: Iterable[str] | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    if not isinstance(patterns, Iterable):
        raise ValueError(f"BitsandbytesPrecision(ignore_modules={patterns!r}): expected a set of name patterns")
    given = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    return tuple(check_pattern(pattern) for pattern in given)
