"""What transformers' own quantiser leaves on a model, and peft, accelerate, Trainer and TRL ask for.

Imported only where a model of transformers is met.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig as TheirConfig
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from precision_bnb.config import BitsAndBytesConfig
from precision_bnb.convert import dequantize
from precision_bnb.export import bitsandbytes_state_dict, is_exported
from precision_bnb.layers import Quantized


class _Quantizer:
    """What our quantisers have in common; beside transformers' own class."""

    handed: dict[str, Any] | None = None
    """The state dict that `save_pretrained` was given; transformers asks the quantiser for one in its place."""

    def get_state_dict_and_metadata(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        return bitsandbytes_state_dict(model) if self.handed is None else self.handed, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if isinstance(dtype, str):  # of a config that was saved
            dtype = getattr(torch, dtype.removeprefix("torch."))
        return dequantize(model, dtype)


class Quantizer4bit(_Quantizer, Bnb4BitHfQuantizer):
    """transformers' quantiser of 4 bits; saves what packed weights are in bitsandbytes' form."""


class Quantizer8bit(_Quantizer, Bnb8BitHfQuantizer):
    """transformers' quantiser of 8 bits; saves what packed weights are in bitsandbytes' form."""


class SavePretrained:
    """A model's `save_pretrained`, which writes bitsandbytes' form of packed weights; copied and pickled with it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
        """As the model's class does it; a `state_dict` may have packed weights, or bitsandbytes' form.

        Raises:
            ValueError: `distributed_checkpoint=True`, whose shards would not be what config.json says.
        """
        model = self.model
        if kwargs.get("distributed_checkpoint"):
            raise ValueError(
                "save_pretrained(distributed_checkpoint=True) would write packed weights beside a config.json that "
                "says bitsandbytes': leave it out, or save shards with fabric.save(folder, {'model': model})"
            )
        quantizer = model.hf_quantizer
        model.config.quantization_config.llm_int8_skip_modules = left_as_floats(model)
        quantizer.handed = bitsandbytes_state_dict(model, state_dict)
        try:
            type(model).save_pretrained(model, save_directory, *args, state_dict=quantizer.handed, **kwargs)
        finally:
            quantizer.handed = None


def models_in(module: nn.Module) -> Iterator[Any]:
    """Yields the models of transformers in `module`, itself too, but none that is a part of another one."""
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from models_in(child)


def left_as_floats(model: nn.Module) -> list[str]:
    """Returns the linear layers that stayed floats: `llm_int8_skip_modules`, by which transformers makes the others."""
    plain = [name for name, each in model.named_modules() if type(each) in (nn.Linear, Conv1D) and "lora_" not in name]
    return sorted(plain)


def mark(module: nn.Module, config: BitsAndBytesConfig) -> None:
    """Sets what transformers' quantiser sets on each quantised model in `module`, and how it saves itself."""
    for model in models_in(module):
        if not any(is_exported(layer) for layer in model.modules()):
            continue
        bits = 4 if config.load_in_4bit else 8
        theirs = TheirConfig(**replace(config, block_size=64).to_dict())
        theirs.llm_int8_skip_modules = left_as_floats(model)
        model.hf_quantizer = (Quantizer4bit if bits == 4 else Quantizer8bit)(theirs)
        model.is_quantized, model.quantization_method = True, theirs.quant_method
        setattr(model, f"is_loaded_in_{bits}bit", True)
        model.config.quantization_config = theirs
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                part.config._is_quantized = True
        model.save_pretrained = SavePretrained(model)
        _forget_how_it_was_loaded(model)


def _forget_how_it_was_loaded(model: Any) -> None:
    """Drops steps of loading that undid a quantiser's form: transformers would reverse them in a save, and cannot."""
    steps = getattr(model, "_weight_conversions", None)
    if steps is not None:
        model._weight_conversions = [each for each in steps if not _is_of_quantiser(each)]


def _is_of_quantiser(step: Any) -> bool:
    return any(getattr(operation, "hf_quantizer", None) is not None for operation in getattr(step, "operations", ()))


def unmark(module: nn.Module) -> None:
    """Takes from models whose layers are floats again what `mark` has set."""
    for model in models_in(module):
        if any(isinstance(layer, Quantized) for layer in model.modules()):
            continue
        for name in (
            "hf_quantizer",
            "is_loaded_in_4bit",
            "is_loaded_in_8bit",
            "quantization_method",
            "save_pretrained",
        ):
            vars(model).pop(name, None)
        model.is_quantized = False
        vars(model.config).pop("quantization_config", None)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                vars(part.config).pop("_is_quantized", None)
