"""The layers that stand in the place of `nn.Linear` and `nn.Embedding`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precision_bnb import fast
from precision_bnb.loading import load_packed
from precision_bnb.packed import NESTED_BLOCK, Format, Layout
from precision_bnb.params import as_packed
from precision_bnb.products import product, training_product
from precision_bnb.quantizing import dequantize, make_codes, nested_code, pairs_of
from precision_bnb.vendors import As4bit, As8bit
from precision_bnb.views import Views


def _shown(layer: Any) -> str:
    """Returns what errors call a layer: its type, and its name in the model once it was set up."""
    return layer.shown or type(layer).__name__


class Quantized(nn.Module):
    """Base class of quantised layers: `weight` is one tensor of packed bytes, and `layout` says what is where.

    Moving to another device moves it, casting to another dtype leaves it. Its state is `weight`, under the same name as
    the float layer's; loading takes packed weights of the same format, floats, which it quantises, or bitsandbytes'.
    """

    weight: Tensor
    layout: Layout
    compute_dtype: torch.dtype
    float_dtype: torch.dtype = torch.float32
    """The dtype that was quantised, which bitsandbytes dequantises to where peft or transformers ask it to."""
    transposed: bool = False
    """Whether float checkpoints have (columns, rows), as Hugging Face's Conv1D does."""
    loads_unsharded = ("weight",)
    """Tensors that `fabric.load_module` hands over unsharded, to be checked or quantised before they are sharded."""
    shown = ""
    quantizes_on: torch.device | None = None
    """Where floats of a checkpoint are quantised: the device of the strategy that the layer was set up for. None: where
    the weight is."""
    _repacked: fast.Repacked | None = None
    _views: Views | None = None

    @property
    def format(self) -> Format:
        """How the weight is quantised."""
        return self.layout.format

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weight as floats, (rows, columns) as `nn.Linear` has them; `ValueError` for other dtypes."""
        return dequantize(self._checked_weight(), self.layout, dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter; a weight that bitsandbytes has quantised, by peft's merge for example, is packed."""
        if name == "weight" and param is not None:
            param = as_packed(param, self.layout, self.float_dtype)
            self.forget()
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Raises `RuntimeError`: there are no initial values for packed weights."""
        raise RuntimeError(
            f"this {type(self).__name__} has packed weights, which are loaded and not initialised: load values first, "
            "fabric.load_module(path, model), or quantise a model that has values"
        )

    @property
    def W_q(self) -> Tensor:
        """The packed weight; by this name (HQQ's) peft finds that `dequantize()` is to be called, for DoRA."""
        return self.weight

    def _checked_weight(self) -> Tensor:
        weight, storage = self.weight, self.layout.format.storage
        if weight.dtype is not storage:
            raise RuntimeError(
                f"the packed weight of this {_shown(self)} was cast from {storage} to {weight.dtype}, which "
                "destroys it: load it again, and cast by module.to(dtype), not by param.data. peft's "
                "prepare_model_for_kbit_training casts int8 weights so that are stored as bfloat16 or float16: "
                "leave bnb_4bit_quant_storage out"
            )
        if weight.shape != self.layout.shape:
            raise RuntimeError(
                f"the packed weight of this {_shown(self)} has shape {tuple(weight.shape)} in place of "
                f"{self.layout.shape}: it was overwritten, load it again"
            )
        return weight

    def _opened(self) -> Views:
        """Returns views of the weight's parts, those of the last forward where they still are; checks new ones."""
        if torch.compiler.is_compiling():  # a trace has no addresses
            return Views(self._checked_weight(), self.layout)
        views = self._views
        if views is None or not views.are_of(self.weight):
            views = self._views = Views(self._checked_weight(), self.layout)
        return views

    def forget(self) -> None:
        """Drops what a forward keeps for the next one and can make again; it holds on to the memory of the weight."""
        self._repacked = self._views = None

    def _is_intact(self) -> bool:
        return self.weight.dtype is self.layout.format.storage and self.weight.shape == self.layout.shape

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and casts; the packed weight is moved as bytes, and is never cast."""
        weight = self._parameters["weight"]
        self.forget()

        def apply(tensor: Tensor) -> Tensor:
            if tensor is not weight:
                return fn(tensor)
            held = tensor.detach()
            if type(held) is Tensor:  # shards cannot be viewed in another dtype
                held = held.view(torch.uint8)
            moved = fn(held)
            if moved.dtype is not held.dtype:  # module.type(dtype) casts integers, too
                moved = held.to(moved.device)
            return moved if moved.dtype is tensor.dtype else moved.view(tensor.dtype)

        move: Any = super()._apply
        moved_module = move(apply, recurse)
        make_codes(self.format, self.weight.device)
        return moved_module

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and saved: not what can be made again, nor a device that another machine may not have."""
        return {**vars(self), "_repacked": None, "_views": None, "quantizes_on": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore: Any = super().__setstate__  # torch has no types for it
        restore(state)
        weight: Any = self._parameters["weight"]  # which comes as a plain parameter
        self.weight = weight
        make_codes(self.format, self.weight.device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        errors = args[-1]
        try:
            load_packed(self, own, prefix)
        except ValueError as error:
            errors.append(f"{prefix}weight: {error}")
            return
        self.forget()
        if f"{prefix}weight" in own and type(self.weight.detach()) is Tensor and not self._is_intact():
            self.weight.data = self.layout.empty(self.weight.device)
        nn.Module._load_from_state_dict(self, own, prefix, *args)  # bitsandbytes' layers have their own

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)


def _rows(x: Tensor, layer: QuantizedLinear | Int8TrainingLinear) -> Tensor:
    """Returns `x` (..., in) as (n, in); raises `RuntimeError` for integers and other widths, as `nn.Linear` does."""
    columns, rows = layer.in_features, layer.out_features
    if not x.is_floating_point():
        raise RuntimeError(
            f"this {_shown(layer)} expects floats, and was given {x.dtype}. A model that casts its input to the "
            "dtype of the layer's weight needs that layer as it is: name it in ignore_modules"
        )
    if not x.dim() or x.shape[-1] != columns:
        raise RuntimeError(f"input of shape {tuple(x.shape)} cannot be multiplied with a weight of ({rows}, {columns})")
    return x.reshape(-1, columns)


def _as_input(result: Tensor, x: Tensor) -> Tensor:
    """Returns `result` (n, out) as (..., out), like `x`; not as a view, of which FSDP2 warns at the root."""
    if x.dim() == 2:
        return result
    shaped: Tensor = torch.ops.aten._unsafe_view.default(result, (*x.shape[:-1], result.shape[-1]))
    return shaped


class QuantizedLinear(Quantized, nn.Linear):
    """x (..., in) -> (..., out) with 4- or 8-bit weights, in `compute_dtype`; the result has the dtype of `x`.

    Under autocast the result is in autocast's dtype. `threshold` is LLM.int8()'s, for int8 weights in evaluation.
    `fast_inference` evaluates by the CPU's fused kernel where its shapes allow it. A new one is a `QuantizedLinear4bit`
    or a `QuantizedLinear8bit`, which are bitsandbytes' `Linear4bit` and `Linear8bitLt` to others.
    """

    threshold: float = 0.0
    source_cls: type[nn.Module]
    """The class of the float layer; transformers' name for it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> QuantizedLinear:
        """Chooses the class by the layout; those that are copied and unpickled have theirs already."""
        kind: type[QuantizedLinear] = cls
        if cls is QuantizedLinear and (args or kwargs):
            layout: Layout = kwargs["layout"] if "layout" in kwargs else args[2]
            kind = QuantizedLinear8bit if layout.format.quant_type == "int8" else QuantizedLinear4bit
        return object.__new__(kind)

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        layout: Layout,
        compute_dtype: torch.dtype,
        *,
        threshold: float = 0.0,
        fast_inference: bool = False,
        transposed: bool = False,
        float_dtype: torch.dtype = torch.float32,
        source_cls: type[nn.Module] = nn.Linear,
    ) -> None:
        nn.Module.__init__(self)
        make_codes(layout.format, weight.device)
        self.in_features, self.out_features = layout.columns, layout.rows
        self.float_dtype, self.source_cls = float_dtype, source_cls
        self.layout = layout
        self.compute_dtype = compute_dtype
        self.threshold = threshold
        self.fast_inference = fast_inference
        self.transposed = transposed
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias (..., out) in the dtype of `x` or autocast's; `RuntimeError` for integers, other widths."""
        views, dtype = self._opened(), self.compute_dtype
        cast = torch.is_autocast_enabled(x.device.type)
        output = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        rows = _rows(x, self).to(dtype)
        with torch.autocast(x.device.type, enabled=False) if cast else nullcontext():
            if self.fast_inference and not self.training and not torch.is_grad_enabled():
                result = self._fast(rows, bias, views)
            else:
                result = product(rows, self.weight, bias, views, self.threshold, self.training)
        return _as_input(result, x).to(output)

    def _fast(self, x: Tensor, bias: Tensor | None, views: Views) -> Tensor:
        if x.device.type != "cpu" or not fast.supports(self.layout):
            return product(x, self.weight, bias, views, self.threshold, False)
        if self._repacked is None or not self._repacked.is_of(self.weight):
            self._repacked = fast.Repacked(self.weight, self.layout)
        return self._repacked.product(x, bias)

    def train(self, mode: bool = True) -> Any:
        """Sets the mode; training drops the copy for the fused kernel."""
        if mode:
            self._repacked = None
        return super().train(mode)

    def extra_repr(self) -> str:
        """Arguments of the layer for `print(model)`."""
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, {self.format}, compute={self.compute_dtype}"


class QuantizedLinear4bit(QuantizedLinear, As4bit):
    """A `QuantizedLinear` of 4 bits, and bitsandbytes' `Linear4bit` to whoever asks for that."""


class QuantizedLinear8bit(QuantizedLinear, As8bit):
    """A `QuantizedLinear` of 8 bits, and bitsandbytes' `Linear8bitLt` to whoever asks for that."""


LINEARS: tuple[type[QuantizedLinear], ...] = (QuantizedLinear4bit, QuantizedLinear8bit)
"""The classes that a `QuantizedLinear` may have."""


class QuantizedEmbedding(Quantized, nn.Embedding):
    """ids (...) -> (..., width) in `compute_dtype`, from 4 or 8 bits; only the rows of `ids` are dequantised."""

    def __init__(self, weight: Tensor, layout: Layout, compute_dtype: torch.dtype, padding_idx: int | None) -> None:
        nn.Module.__init__(self)
        make_codes(layout.format, weight.device)
        self.num_embeddings, self.embedding_dim = layout.rows, layout.columns
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.layout = layout
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the rows of `ids`, integers of any shape; raises what `nn.Embedding` raises."""
        layout, dtype = self.layout, self.compute_dtype
        parts = self._opened().parts
        if layout.format.quant_type == "int8":
            values, scales = F.embedding(ids, parts.codes), F.embedding(ids, parts.scales.view(-1, 1))
            return (values * scales.mul_(1.0 / 127.0)).to(dtype)
        columns, block = layout.columns, layout.format.block_size
        F.embedding(ids, parts.codes[:1].expand(layout.rows, 1))  # raises for ids of other dtypes, below 0 or too large
        start = ids.long() * columns  # of each row, in weights
        # All tables of (ids, columns) have the bytes that they need: the rows' own, and indices in int32.
        row_bytes = parts.codes.unfold(0, (columns + 1) // 2, 1)[start // 2]
        values = F.embedding(row_bytes.int(), pairs_of(layout.format.quant_type, ids.device)).flatten(-2)
        if columns % 2:  # a row may begin in the middle of a byte
            values = torch.where(start.unsqueeze(-1) % 2 == 0, values[..., :-1], values[..., 1:])
        run = math.gcd(columns, block)  # values side by side that share a scale, wherever their row begins
        ends = torch.arange(0, columns, run, dtype=torch.int32, device=ids.device)
        blocks = ((start % block).int().unsqueeze(-1) + ends) // block + (start // block).int().unsqueeze(-1)
        scales = F.embedding(blocks, parts.scales.view(-1, 1))
        if parts.nested is not None:
            assert parts.offset is not None
            scales = F.embedding(scales.int().squeeze(-1), nested_code(ids.device).view(-1, 1))
            scales = scales * F.embedding(blocks // NESTED_BLOCK, parts.nested.view(-1, 1)) + parts.offset
        return values.unflatten(-1, (-1, run)).mul_(scales).flatten(-2).to(dtype)

    def extra_repr(self) -> str:
        """Arguments of the layer for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}"


class Int8TrainingLinear(nn.Linear):
    """`nn.Linear` whose float weight is quantised to int8, row by row, in each forward, and trains.

    bitsandbytes' `Linear8bitLt(has_fp16_weights=True)` keeps the codes of an earlier forward while there is a gradient,
    and in evaluation: after `zero_grad(set_to_none=False)` it never sees another step. Here every forward quantises.
    `transposed`: the weight is (in, out), as Hugging Face's Conv1D has it.
    """

    compute_dtype: torch.dtype
    threshold: float
    transposed: bool = False
    shown = ""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        compute_dtype: torch.dtype,
        *,
        threshold: float = 0.0,
        transposed: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = reversed(weight.shape) if transposed else weight.shape
        self.compute_dtype = compute_dtype
        self.threshold = threshold
        self.transposed = transposed
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias (..., out) in the dtype of `x` or autocast's; `RuntimeError` for integers, other widths."""
        dtype = self.compute_dtype
        cast = torch.is_autocast_enabled(x.device.type)
        output = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        rows = _rows(x, self).to(dtype)
        with torch.autocast(x.device.type, enabled=False) if cast else nullcontext():
            weight = self.weight.t().contiguous() if self.transposed else self.weight
            result = training_product(rows, weight, bias, self.threshold, self.training)
        return _as_input(result, x).to(output)
