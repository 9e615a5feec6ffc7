"""precision-te: FP8 and narrower through NVIDIA Transformer Engine, and the same recipes in plain torch anywhere."""

from precision_te.convert import convert as convert
from precision_te.convert import restore as restore
from precision_te.engine import Engine as Engine
from precision_te.plugin import MODES as MODES
from precision_te.plugin import TransformerEnginePrecision as TransformerEnginePrecision
from precision_te.recipes import MXFP8 as MXFP8
from precision_te.recipes import NVFP4 as NVFP4
from precision_te.recipes import Block as Block
from precision_te.recipes import Current as Current
from precision_te.recipes import Delayed as Delayed
from precision_te.recipes import recipe_from as recipe_from
