"""precision-bnb: 4- and 8-bit weights by bitsandbytes, as a plugin of precision-core."""

from precision_bnb.config import MODES as MODES
from precision_bnb.config import BitsAndBytesConfig as BitsAndBytesConfig
from precision_bnb.convert import dequantize as dequantize
from precision_bnb.convert import quantize as quantize
from precision_bnb.layers import Int8TrainingLinear as Int8TrainingLinear
from precision_bnb.layers import QuantizedEmbedding as QuantizedEmbedding
from precision_bnb.layers import QuantizedLinear as QuantizedLinear
from precision_bnb.plugin import BitsandbytesPrecision as BitsandbytesPrecision
