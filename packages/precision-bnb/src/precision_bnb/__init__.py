"""precision-bnb: 4- and 8-bit weights by bitsandbytes, as a plugin of precision-core.

What needs bitsandbytes is imported when it is first asked for: `precision_bnb.support`, by which `supports` and
`precision doctor` know what runs where, works without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from precision_bnb.config import MODES as MODES
from precision_bnb.config import BitsAndBytesConfig as BitsAndBytesConfig

if TYPE_CHECKING:
    from precision_bnb.convert import dequantize as dequantize
    from precision_bnb.convert import quantize as quantize
    from precision_bnb.export import bitsandbytes_state_dict as bitsandbytes_state_dict
    from precision_bnb.layers import Int8TrainingLinear as Int8TrainingLinear
    from precision_bnb.layers import QuantizedEmbedding as QuantizedEmbedding
    from precision_bnb.layers import QuantizedLinear as QuantizedLinear
    from precision_bnb.plugin import BitsandbytesPrecision as BitsandbytesPrecision
    from precision_bnb.states import with_8bit_states as with_8bit_states

_LATER = {
    "dequantize": "convert",
    "quantize": "convert",
    "Int8TrainingLinear": "layers",
    "QuantizedEmbedding": "layers",
    "QuantizedLinear": "layers",
    "BitsandbytesPrecision": "plugin",
    "bitsandbytes_state_dict": "export",
    "with_8bit_states": "states",
}
"""Public name -> the module that has it, and imports bitsandbytes."""

__all__ = ["MODES", "BitsAndBytesConfig", *_LATER]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
