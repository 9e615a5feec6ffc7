"""Converting a model: float layers and bitsandbytes' own to quantised ones, and back to floats."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from precision_bnb import adopt, fast
from precision_bnb.adapters import ADAPTERS, tell_peft_of_conv1d, trains_in_peft
from precision_bnb.config import COMPUTE_DTYPES, BitsAndBytesConfig
from precision_bnb.layers import LINEARS, Int8TrainingLinear, Quantized, QuantizedEmbedding, QuantizedLinear
from precision_bnb.lookalikes import differs_from_linear, linear_kinds
from precision_bnb.packed import Format, Layout
from precision_bnb.quantizing import check_floating, check_values
from precision_bnb.quantizing import quantize as quantize_weight
from precision_bnb.reading import weight_readers
from precision_core.policy import matches
from precision_core.precision import marks
from precision_core.surgery import Replacement, Surgery, replace_layers

IGNORED = ("lm_head", "embed_out", "output_layer", "score", "classifier")
"""Modules that stay as they are where nothing else is said: heads, whose rounding reaches the result unaveraged."""


def quantize(
    module: nn.Module,
    config: BitsAndBytesConfig,
    compute_dtype: torch.dtype,
    ignore_modules: Iterable[str] | None = None,
    *,
    embeddings: bool = False,
    device: torch.device | None = None,
    dry_run: bool = False,
) -> Surgery:
    """Replaces the layers of `module` by quantised ones, in place, one after another; returns the module and a report.

    Layers on the meta device become quantised ones on the meta device, to be loaded. bitsandbytes' own layers become
    ours, with the same codes and scales. `device` is where values are quantised, a chunk at a time; None: where each
    weight is. The results stay where the weights are.

    Raises:
        ValueError: nothing was changed. A pattern of `ignore_modules` that matches no module; layers that would
            lose something, a parametrisation for example; weights that are infinite, NaN or, for int8, beyond 65504;
            a layer of bitsandbytes that is quantised in another way; `embeddings` with int8-training;
            `fast_inference` on a CPU without that kernel.
        RuntimeError: a layer could not be quantised, for want of memory for example; says how many were before it.
    """
    fast.check(config)
    check_embeddings(config, embeddings)
    maker = _Maker(config, compute_dtype, device)
    table = maker.table(embeddings, module)
    maker.find_readers(module, table)
    return _replaced(module, table, config, ignore_modules, dry_run)


def adopt_raw(
    module: nn.Module,
    config: BitsAndBytesConfig,
    compute_dtype: torch.dtype,
    ignore_modules: Iterable[str] | None = None,
    *,
    device: torch.device | None = None,
    dry_run: bool = False,
) -> Surgery:
    """Converts bitsandbytes' own layers as `quantize` does, and leaves all others as they are."""
    maker = _Maker(config, compute_dtype, device)
    table = maker.theirs()
    maker.find_readers(module, table)
    return _replaced(module, table, config, ignore_modules, dry_run)


def check_embeddings(config: BitsAndBytesConfig, embeddings: bool) -> None:
    """Raises `ValueError` where embeddings are to be quantised, and the mode does not quantise any."""
    if embeddings and format_of(config) is None:
        raise ValueError(f"embeddings=True: {config.mode} does not quantise embeddings; leave it out")


def _replaced(
    module: nn.Module,
    table: Mapping[type[nn.Module], Replacement],
    config: BitsAndBytesConfig,
    ignore_modules: Iterable[str] | None,
    dry_run: bool,
) -> Surgery:
    exclude = _patterns(module, config, ignore_modules)
    try:
        surgery = replace_layers(module, table, exclude=exclude, mode=config.mode, dry_run=dry_run)
    except ValueError as error:
        raise ValueError(str(error).replace("with exclude=", "with ignore_modules=")) from None
    if not dry_run:
        tell_peft_of_conv1d(surgery.module, _conv1d())
    return surgery


def _patterns(module: nn.Module, config: BitsAndBytesConfig, given: Iterable[str] | None) -> tuple[str, ...]:
    """Returns the patterns of what stays; of those that we add, those that match something."""
    given = config.llm_int8_skip_modules if given is None else given
    given = (given,) if isinstance(given, str) else given
    names = [name for name, _ in module.named_modules()]
    ours = (*(IGNORED if given is None else ()), *ADAPTERS, *_kept_wide(module))
    used = tuple(pattern for pattern in dict.fromkeys(ours) if any(matches(pattern, name) for name in names))
    return (*used, *trains_in_peft(module), *sorted(given or ()))


def _kept_wide(module: nn.Module) -> Iterator[str]:
    """Yields the modules that transformers' models keep in float32: T5 casts inputs to the dtype of such a weight."""
    for child in module.modules():
        for part, _ in marks(child):
            yield part.removesuffix(".weight")


class _Maker:
    """Makes the new layers of one configuration."""

    def __init__(
        self, config: BitsAndBytesConfig, compute_dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self.config, self.compute_dtype, self.device = config, compute_dtype, device
        self.format = format_of(config)
        self.read: Mapping[nn.Module, str] = {}  # layers whose weight is read by other code than their own, and by what

    def table(self, embeddings: bool, module: nn.Module) -> dict[type[nn.Module], Replacement]:
        """Returns how each type of layer is replaced that `module` may have."""
        packs = self.format is not None
        known = (*adopt.BNB_LAYERS, QuantizedLinear, Int8TrainingLinear)
        like_linear = Replacement(self.linear, self._check_like, packs=packs)
        table = dict.fromkeys(linear_kinds(module, known), like_linear)
        table[nn.Linear] = Replacement(self.linear, self._check, packs=packs)
        conv1d = _conv1d()
        if conv1d is not None:
            table[conv1d] = Replacement(self.conv1d, self._check, packs=packs)
        if embeddings:
            table[nn.Embedding] = Replacement(self.embedding, self._check_embedding, packs=True)
        return table | self.theirs()

    def find_readers(self, module: nn.Module, table: Mapping[type[nn.Module], Replacement]) -> None:
        """Looks for code that reads the weights of the layers in `table`; where they stay floats, it may."""
        layers = [layer for layer in module.modules() if type(layer) in table]
        if self.format is not None and layers:
            self.read = weight_readers(module, layers)

    def theirs(self) -> dict[type[nn.Module], Replacement]:
        """Returns how bitsandbytes' own layers are replaced."""
        return dict.fromkeys(
            adopt.BNB_LAYERS, Replacement(self.adopted, self._check_adopted, packs=self.format is not None)
        )

    def linear(self, layer: nn.Module) -> nn.Module:
        return self._linear(layer, transposed=False)

    def conv1d(self, layer: nn.Module) -> nn.Module:
        return self._linear(layer, transposed=True)

    def _linear(self, layer: nn.Module, transposed: bool) -> nn.Module:
        assert isinstance(layer.weight, nn.Parameter)
        if self.format is None:
            return self._training(layer.weight, layer.bias, transposed)
        rows, columns = reversed(layer.weight.shape) if transposed else layer.weight.shape
        layout = Layout(self.format, rows, columns)
        packed = quantize_weight(layer.weight, self.format, transposed=transposed, device=self.device)
        return self._made(packed, layer, layout, layer.weight.dtype, transposed)

    def _made(
        self, packed: Tensor, layer: nn.Module, layout: Layout, floats: torch.dtype, transposed: bool = False
    ) -> QuantizedLinear:
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        source = getattr(layer, "source_cls", nn.Linear) if isinstance(layer, adopt.BNB_LAYERS) else type(layer)
        return QuantizedLinear(
            packed,
            bias,
            layout,
            self.compute_dtype,
            threshold=float(self.config.llm_int8_threshold),
            fast_inference=self.config.fast_inference,
            transposed=transposed,
            float_dtype=floats if floats in COMPUTE_DTYPES else torch.float32,
            source_cls=source,
        )

    def embedding(self, layer: nn.Module) -> nn.Module:
        assert self.format is not None and isinstance(layer, nn.Embedding)
        layout = Layout(self.format, *layer.weight.shape)
        packed = quantize_weight(layer.weight, self.format, device=self.device)
        return QuantizedEmbedding(packed, layout, self.compute_dtype, layer.padding_idx)

    def _training(self, weight: nn.Parameter, bias: Any, transposed: bool = False) -> nn.Module:
        threshold = float(self.config.llm_int8_threshold)
        return Int8TrainingLinear(weight, bias, self.compute_dtype, threshold=threshold, transposed=transposed)

    def adopted(self, layer: nn.Module) -> nn.Module:
        """Takes over a layer of bitsandbytes; one that is not quantised yet is quantised."""
        assert isinstance(layer, nn.Linear)
        if self.format is None:
            weight = adopt.floats_of(layer)
            adopt.strip_bnb_state(layer)
            return self._training(weight, layer.bias)
        layout = Layout(self.format, layer.out_features, layer.in_features)
        floats = adopt.float_dtype_of(layer)
        packed = adopt.pack_bnb_layer(layer, layout)
        if packed is None:
            packed = quantize_weight(adopt.floats_of(layer), self.format, device=self.device)
        adopt.strip_bnb_state(layer)
        return self._made(packed, layer, layout, floats)

    def _check_adopted(self, name: str, layer: nn.Module) -> str | None:
        """Raises `ValueError` for one that is quantised in another way, while nothing is changed yet."""
        assert isinstance(layer, nn.Linear)
        adopt.check_bnb_layer(name, layer, self.format, self.config.mode)
        if adopt.format_of_bnb_layer(layer) is None:
            return self._check(name, layer)
        if layer in self.read:
            raise ValueError(
                f"{name}: its weight is read by {self.read[layer]}, and bitsandbytes has packed it: load the model "
                f"with that layer as it is, llm_int8_skip_modules=[{name!r}], and name it in ignore_modules here"
            )
        return None

    def _check(self, name: str, layer: nn.Module) -> str | None:
        """Returns why a layer is left alone; raises `ValueError` for values that cannot be quantised."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if layer in self.read:
            return f"its weight is read by {self.read[layer]}"
        if not weight.numel():
            return "it has no weights"
        if not weight.is_floating_point():
            return f"its weight is {weight.dtype}"
        try:
            check_values(weight, self.format)
        except ValueError as error:
            raise ValueError(f"{name or 'the model'} cannot be converted, and nothing was changed: {error}") from error
        return None

    def _check_like(self, name: str, layer: nn.Module) -> str | None:
        if parametrize.is_parametrized(layer):
            return None  # which is refused
        return differs_from_linear(layer) or self._check(name, layer)

    def _check_embedding(self, name: str, layer: nn.Module) -> str | None:
        assert isinstance(layer, nn.Embedding)
        return "max_norm writes to its weight" if layer.max_norm is not None else self._check(name, layer)


def format_of(config: BitsAndBytesConfig) -> Format | None:
    """Returns how weights are stored; None: as floats, which int8-training quantises in each forward."""
    storage = config.bnb_4bit_quant_storage
    if config.load_in_4bit:
        return Format(config.bnb_4bit_quant_type, config.block_size, config.bnb_4bit_use_double_quant, storage)
    return None if config.llm_int8_has_fp16_weight else Format("int8", storage=storage)


def _conv1d() -> type[nn.Module] | None:
    """Returns transformers' Conv1D, a linear layer with a transposed weight, if anybody has imported it."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def converted(module: nn.Module) -> Iterator[tuple[str, Quantized | Int8TrainingLinear]]:
    """Yields name and layer of all quantised layers, those of int8-training too."""
    for name, child in module.named_modules():
        if isinstance(child, (Quantized, Int8TrainingLinear)):
            yield name, child


def dequantize(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replaces quantised layers by `nn.Linear` (or Conv1D) and `nn.Embedding` in `dtype`, in place; returns the module.

    Weights have the quantised values and stay frozen. For merging adapters, for example, or for saving floats.

    Raises:
        ValueError: nothing is quantised, or `dtype` is not floating; nothing was changed.
    """
    check_floating(dtype)

    def empty(layer: QuantizedLinear | Int8TrainingLinear) -> Any:
        if not layer.transposed:
            return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        kind: Any = _conv1d()
        if kind is None:
            raise ImportError("this layer was transformers' Conv1D: import transformers.pytorch_utils first")
        with torch.device("meta"):
            return kind(layer.out_features, layer.in_features)

    def linear(layer: nn.Module) -> nn.Module:
        assert isinstance(layer, QuantizedLinear)
        new, weight = empty(layer), layer.dequantize(dtype)
        new.weight = nn.Parameter(weight.t().contiguous() if layer.transposed else weight, requires_grad=False)
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=layer.bias.requires_grad)
        return new

    def embedding(layer: nn.Module) -> nn.Module:
        assert isinstance(layer, QuantizedEmbedding)
        weight = layer.dequantize(dtype)
        return nn.Embedding.from_pretrained(weight, freeze=True, padding_idx=layer.padding_idx)

    def training(layer: nn.Module) -> nn.Module:
        assert isinstance(layer, Int8TrainingLinear)
        new = empty(layer)
        new.weight, new.bias = layer.weight, layer.bias
        return new

    table = {
        **dict.fromkeys(LINEARS, Replacement(linear, packs=True)),
        QuantizedEmbedding: Replacement(embedding, packs=True),
        Int8TrainingLinear: Replacement(training),
    }
    surgery = replace_layers(module, table)
    if not surgery.report.converted:
        raise ValueError(f"dequantize: this {type(module).__name__} has no quantised layer")
    tell_peft_of_conv1d(surgery.module, _conv1d())
    if "precision_bnb.huggingface" in sys.modules:
        import_module("precision_bnb.huggingface").unmark(surgery.module)
    return surgery.module
