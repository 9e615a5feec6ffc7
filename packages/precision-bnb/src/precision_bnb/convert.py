"""Converting a model: layers become quantised ones, those of bitsandbytes are taken over, and back to floats."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from precision_bnb import adopt
from precision_bnb.config import BitsAndBytesConfig
from precision_bnb.layers import Int8TrainingLinear, Quantized, QuantizedEmbedding, QuantizedLinear
from precision_bnb.packed import Format, Layout
from precision_bnb.quantize import quantize as quantize_weight
from precision_core.patterns import matches
from precision_core.surgery import Replacement, Surgery, replace_layers

IGNORED = ("lm_head", "embed_out", "output_layer", "score", "classifier")
"""Modules that stay as they are where nothing else is said: heads, whose rounding reaches the result unaveraged."""

ADAPTERS = ("lora_A", "lora_B", "modules_to_save")
"""Modules that always stay as they are: peft's, which train."""


def quantize(
    module: nn.Module,
    config: BitsAndBytesConfig,
    compute_dtype: torch.dtype,
    ignore_modules: Iterable[str] | None = None,
    *,
    embeddings: bool = False,
    dry_run: bool = False,
) -> Surgery:
    """Replaces the layers of `module` by quantised ones, in place, one after another; returns what was done.

    Layers on the meta device become quantised ones on the meta device, to be loaded. bitsandbytes' own layers become
    ours, with the same codes and scales.

    Raises:
        ValueError: a pattern of `ignore_modules` that matches no module, layers that would lose something; nothing was
            changed. Nor was it for a layer of bitsandbytes that is quantised in another way.
        RuntimeError: a layer that could not be quantised, for infinite weights for example; says how many were.
    """
    table = _Maker(config, compute_dtype).table(embeddings)
    exclude = _patterns(module, config, ignore_modules)
    return replace_layers(module, table, exclude=exclude, mode=config.mode, dry_run=dry_run)


def _patterns(module: nn.Module, config: BitsAndBytesConfig, given: Iterable[str] | None) -> tuple[str, ...]:
    """Returns the patterns of what stays; of those that we add, those that match something."""
    given = config.llm_int8_skip_modules if given is None else given
    given = (given,) if isinstance(given, str) else given
    names = [name for name, _ in module.named_modules()]
    ours = (*(IGNORED if given is None else ()), *ADAPTERS)
    used = tuple(pattern for pattern in ours if any(matches(pattern, name) for name in names))
    return (*used, *sorted(given or ()))


class _Maker:
    """Makes the new layers of one configuration."""

    def __init__(self, config: BitsAndBytesConfig, compute_dtype: torch.dtype) -> None:
        self.config, self.compute_dtype = config, compute_dtype
        self.format = format_of(config)

    def table(self, embeddings: bool) -> dict[type[nn.Module], Replacement]:
        """Returns how each type of layer is replaced."""
        adopted = Replacement(self.adopted, self._check_adopted, packs=self.format is not None)
        theirs: dict[type[nn.Module], Replacement] = dict.fromkeys(adopt.THEIRS, adopted)
        if self.format is None:
            return {nn.Linear: Replacement(self.training, _no_weights), **theirs}
        linear = Replacement(self.linear, _no_weights, packs=True)
        table: dict[type[nn.Module], Replacement] = {nn.Linear: linear}
        conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
        if conv1d is not None:
            table[conv1d] = Replacement(self.conv1d, _no_weights, packs=True)
        if embeddings:
            table[nn.Embedding] = Replacement(self.embedding, _no_embedding, packs=True)
        return table | theirs

    def linear(self, layer: nn.Module) -> nn.Module:
        return self._linear(layer, transposed=False)

    def conv1d(self, layer: nn.Module) -> nn.Module:
        return self._linear(layer, transposed=True)

    def _linear(self, layer: nn.Module, transposed: bool) -> nn.Module:
        assert self.format is not None and isinstance(layer.weight, Tensor)
        rows, columns = reversed(layer.weight.shape) if transposed else layer.weight.shape
        layout = Layout(self.format, rows, columns)
        packed = quantize_weight(layer.weight, self.format, transposed=transposed)
        return self._made(packed, layer, layout, transposed)

    def _made(self, packed: Tensor, layer: nn.Module, layout: Layout, transposed: bool = False) -> QuantizedLinear:
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return QuantizedLinear(
            packed,
            bias,
            layout,
            self.compute_dtype,
            threshold=float(self.config.llm_int8_threshold),
            fast_inference=self.config.fast_inference,
            transposed=transposed,
        )

    def embedding(self, layer: nn.Module) -> nn.Module:
        assert self.format is not None and isinstance(layer, nn.Embedding)
        layout = Layout(self.format, *layer.weight.shape)
        packed = quantize_weight(layer.weight, self.format)
        return QuantizedEmbedding(packed, layout, self.compute_dtype, layer.padding_idx)

    def training(self, layer: nn.Module) -> nn.Module:
        assert isinstance(layer, nn.Linear) and isinstance(layer.weight, nn.Parameter)
        return self._training(layer.weight, layer.bias)

    def _training(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        threshold = float(self.config.llm_int8_threshold)
        return Int8TrainingLinear(weight, bias, self.compute_dtype, threshold=threshold)

    def adopted(self, layer: nn.Module) -> nn.Module:
        """Takes over a layer of bitsandbytes; one that is not quantised yet is quantised."""
        assert isinstance(layer, nn.Linear)
        if self.format is None:
            weight = adopt.floats_of(layer)
            adopt.forget_theirs(layer)
            return self._training(weight, layer.bias)
        layout = Layout(self.format, layer.out_features, layer.in_features)
        packed = adopt.packed_theirs(layer, layout)
        if packed is None:
            packed = quantize_weight(adopt.floats_of(layer), self.format)
        adopt.forget_theirs(layer)
        return self._made(packed, layer, layout)

    def _check_adopted(self, name: str, layer: nn.Module) -> str | None:
        """Raises `ValueError` for one that is quantised in another way, while nothing is changed yet."""
        assert isinstance(layer, nn.Linear)
        adopt.check_theirs(name, layer, self.format, self.config.mode)
        return _no_weights(name, layer) if adopt.format_of_theirs(layer) is None else None


def format_of(config: BitsAndBytesConfig) -> Format | None:
    """Returns how weights are stored; None: as floats, which int8-training quantises in each forward."""
    storage = config.bnb_4bit_quant_storage
    if config.load_in_4bit:
        return Format(config.bnb_4bit_quant_type, config.block_size, config.bnb_4bit_use_double_quant, storage)
    return None if config.llm_int8_has_fp16_weight else Format("int8", storage=storage)


def _no_weights(name: str, layer: nn.Module) -> str | None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not weight.numel():
        return "it has no weights"
    return None if weight.is_floating_point() else f"its weight is {weight.dtype}"


def _no_embedding(name: str, layer: nn.Module) -> str | None:
    assert isinstance(layer, nn.Embedding)
    return "max_norm writes to its weight" if layer.max_norm is not None else _no_weights(name, layer)


def converted(module: nn.Module) -> Iterator[tuple[str, Quantized | Int8TrainingLinear]]:
    """Yields name and layer of those that stand in a converted layer's place."""
    for name, child in module.named_modules():
        if isinstance(child, (Quantized, Int8TrainingLinear)):
            yield name, child


def dequantize(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Puts `nn.Linear` and `nn.Embedding` back, in place, with the values of the quantised weights; returns the module.

    Weights and biases are frozen, as they were. For merging adapters, for example, or for saving floats.
    """

    def linear(layer: nn.Module) -> nn.Module:
        assert isinstance(layer, QuantizedLinear)
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=layer.bias.requires_grad)
        return new

    def embedding(layer: nn.Module) -> nn.Module:
        assert isinstance(layer, QuantizedEmbedding)
        weight = layer.dequantize(dtype)
        return nn.Embedding.from_pretrained(weight, freeze=True, padding_idx=layer.padding_idx)

    def training(layer: nn.Module) -> nn.Module:
        assert isinstance(layer, Int8TrainingLinear)
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new.weight, new.bias = layer.weight, layer.bias
        return new

    table = {
        QuantizedLinear: Replacement(linear, packs=True),
        QuantizedEmbedding: Replacement(embedding, packs=True),
        Int8TrainingLinear: Replacement(training),
    }
    surgery = replace_layers(module, table)
    if not surgery.report.converted:
        raise ValueError(f"this {type(module).__name__} has no quantised layer")
    return surgery.module
