"""The settings: transformers' `BitsAndBytesConfig` as a frozen value, with two fields more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from precision_core.policy import check_pattern, nearest, parse_dtype

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that share a scale; what bitsandbytes' 4-bit kernels take."""

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORAGE_DTYPES = (torch.uint8, *COMPUTE_DTYPES)

_IGNORED = ("llm_int8_enable_fp32_cpu_offload",)  # of transformers: how it spreads a model over devices
_OTHERS = ("quant_method", "_load_in_4bit", "_load_in_8bit")  # transformers' to_dict writes these, too


@dataclass(frozen=True, kw_only=True)
class BitsAndBytesConfig:
    """Which weights are quantised, how, and the compute dtype, under transformers' field names where it has the field.

    Exactly one of `load_in_4bit` and `load_in_8bit` is true.

    Raises:
        ValueError: unknown or contradictory values.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    """Columns of the input with a value this large or larger are multiplied unquantised; 0.0: none is."""
    llm_int8_skip_modules: tuple[str, ...] | None = None
    """Name patterns of modules that stay as they are; None: `precision_bnb.convert.IGNORED`."""
    llm_int8_has_fp16_weight: bool = False
    """The weights stay floats that train, and are quantised in each forward: int8-training."""
    bnb_4bit_compute_dtype: torch.dtype | None = None
    """The dtype of products, for 8 bits too; None: bfloat16 or float16 where the device has units, else float32."""
    bnb_4bit_quant_type: str = "fp4"
    """"fp4" or "nf4"."""
    bnb_4bit_use_double_quant: bool = False
    """Whether the scales are quantised to 8 bits in turn: 4.13 bits a weight in place of 4.5."""
    bnb_4bit_quant_storage: torch.dtype = torch.uint8
    """The dtype that packed bytes are viewed as, for engines that shard only tensors of one dtype."""
    block_size: int = 64
    """Weights that share a scale; for 4 bits only."""
    fast_inference: bool = False
    """Evaluate by the CPU's fused kernel, which keeps a second, repacked copy of 4-bit weights; see the README."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise _wrong(field.name, getattr(self, field.name), "True or False")
        if self.load_in_4bit is self.load_in_8bit:
            both = "both are" if self.load_in_4bit else "neither is"
            raise ValueError(f"BitsAndBytesConfig: one of load_in_4bit and load_in_8bit is true, and {both}")
        if self.bnb_4bit_quant_type not in ("fp4", "nf4"):
            raise _wrong("bnb_4bit_quant_type", self.bnb_4bit_quant_type, '"nf4" or "fp4"')
        if self.bnb_4bit_compute_dtype is not None and self.bnb_4bit_compute_dtype not in COMPUTE_DTYPES:
            raise _wrong("bnb_4bit_compute_dtype", self.bnb_4bit_compute_dtype, _names(COMPUTE_DTYPES))
        if self.bnb_4bit_quant_storage not in STORAGE_DTYPES:
            raise _wrong("bnb_4bit_quant_storage", self.bnb_4bit_quant_storage, _names(STORAGE_DTYPES))
        if not isinstance(self.block_size, int) or self.block_size not in BLOCK_SIZES:
            raise _wrong("block_size", self.block_size, ", ".join(map(str, BLOCK_SIZES)))
        threshold = self.llm_int8_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < float("inf"):
            raise _wrong("llm_int8_threshold", threshold, "a number from 0 on")
        if self.llm_int8_skip_modules is not None and not isinstance(self.llm_int8_skip_modules, tuple):
            raise _wrong("llm_int8_skip_modules", self.llm_int8_skip_modules, "a tuple of name patterns, or None")
        for pattern in self.llm_int8_skip_modules or ():
            check_pattern(pattern)
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        four = {
            "llm_int8_has_fp16_weight": self.llm_int8_has_fp16_weight,
        }
        eight = {
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "block_size": self.block_size != 64,
            "fast_inference": self.fast_inference,
        }
        for name, is_set in (four if self.load_in_4bit else eight).items():
            if is_set:
                bits, others = ("4-bit", "8") if self.load_in_4bit else ("8-bit", "4")
                raise ValueError(f"BitsAndBytesConfig: {name} is for {others} bits, and this is {bits}")
        if self.llm_int8_has_fp16_weight and self.bnb_4bit_quant_storage is not torch.uint8:
            raise ValueError("BitsAndBytesConfig: with llm_int8_has_fp16_weight nothing is stored quantised")
        if self.fast_inference and self.bnb_4bit_compute_dtype not in (None, torch.bfloat16):
            raise ValueError(
                f"BitsAndBytesConfig: fast_inference computes in bfloat16, not in {self.bnb_4bit_compute_dtype}"
            )

    @classmethod
    def of(cls, config: Any) -> BitsAndBytesConfig:
        """Converts a mode's name, a dict, transformers' `BitsAndBytesConfig` or an object of this class to settings.

        Raises:
            ValueError: unknown or contradictory settings, with the allowed ones.
        """
        if isinstance(config, BitsAndBytesConfig):
            return config
        if isinstance(config, str):
            return _of_mode(config)
        if not isinstance(config, Mapping):
            to_dict = getattr(config, "to_dict", None)
            if not callable(to_dict) or isinstance(config, type):
                raise ValueError(f"BitsandbytesPrecision({config!r}): expected one of {', '.join(MODES)}, or a config")
            config = to_dict()
        return _of_dict(dict(config))

    @property
    def mode(self) -> str:
        """The name of the mode that these settings are a variant of."""
        if self.load_in_8bit:
            return "int8-training" if self.llm_int8_has_fp16_weight else "int8"
        return self.bnb_4bit_quant_type + "-dq" * self.bnb_4bit_use_double_quant

    def to_dict(self) -> dict[str, Any]:
        """Returns arguments for transformers' `BitsAndBytesConfig(**...)`: plain values, dtypes as strings.

        Raises:
            ValueError: `block_size` is not 64, the only one that class has.
        """
        if self.block_size != 64:
            raise ValueError(
                f"BitsAndBytesConfig(block_size={self.block_size}).to_dict(): transformers has blocks of 64 only; "
                "dataclasses.asdict(config) has all settings"
            )
        compute = self.bnb_4bit_compute_dtype or torch.float32
        skip = self.llm_int8_skip_modules
        return {
            "load_in_8bit": self.load_in_8bit,
            "load_in_4bit": self.load_in_4bit,
            "llm_int8_threshold": float(self.llm_int8_threshold),
            "llm_int8_skip_modules": None if skip is None else list(skip),
            "llm_int8_has_fp16_weight": self.llm_int8_has_fp16_weight,
            "bnb_4bit_compute_dtype": str(compute).removeprefix("torch."),
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "bnb_4bit_quant_storage": str(self.bnb_4bit_quant_storage).removeprefix("torch."),
        }


MODES: dict[str, BitsAndBytesConfig] = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-dq": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "fp4-dq": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "int8-training": BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True, llm_int8_threshold=0.0),
}
"""Name -> settings. int8-training has no threshold, as its training forward quantises no input."""


def _of_mode(mode: str) -> BitsAndBytesConfig:
    if mode in MODES:
        return MODES[mode]
    hint = nearest(mode, MODES)
    if ";" in mode:
        base = mode.partition(";")[0].strip()
        hint = f'; exceptions belong to what is not quantised: BitsandbytesPrecision("{base}", base="bf16-true; ...")'
    raise ValueError(f"BitsandbytesPrecision({mode!r}): expected one of {', '.join(MODES)}, or a config{hint}")


def _of_dict(given: dict[str, Any]) -> BitsAndBytesConfig:
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method", "bitsandbytes")))
    if method != "bitsandbytes":
        raise ValueError(f"expected quant_method 'bitsandbytes' in the config, got {method!r}")
    known = [field.name for field in fields(BitsAndBytesConfig)]
    values = {key: value for key, value in given.items() if key not in (*_IGNORED, *_OTHERS)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)} in the config: allowed are {', '.join(known)}")
    for key in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
        if isinstance(values.get(key), str):
            values[key] = _dtype_of(key, values[key])
    if values.get("load_in_8bit") and "quant_method" in given:
        values.pop("bnb_4bit_compute_dtype", None)  # transformers writes its default, which its 8 bits do not heed
    if values.get("bnb_4bit_quant_storage", torch.uint8) is None:
        del values["bnb_4bit_quant_storage"]
    skip = values.get("llm_int8_skip_modules")
    if isinstance(skip, Iterable) and not isinstance(skip, str):
        values["llm_int8_skip_modules"] = tuple(skip)
    return BitsAndBytesConfig(**values)


def _dtype_of(key: str, name: str) -> torch.dtype:
    name = name.removeprefix("torch.")
    if name == "uint8":
        return torch.uint8
    try:
        return parse_dtype(name)
    except ValueError as error:
        raise ValueError(f"BitsAndBytesConfig({key}={name!r}): {error}") from error


def _wrong(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"BitsAndBytesConfig({name}={value!r}): expected {allowed}")


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
