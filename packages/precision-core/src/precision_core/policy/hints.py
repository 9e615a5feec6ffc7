"""Hints for a mode that does not exist: what it is called here, or the spelling that was meant; never another format.

ELSEWHERE has the names that other libraries use: accelerate ("no", "fp16", "fp8"), Composer ("amp_bf16"), Keras
("mixed_float16"), Apex ("O1", "O2"), torch's dtypes, bitsandbytes ("4bit"), Transformer Engine ("te", "float8").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from precision_core.policy.messages import nearest

ELSEWHERE: dict[tuple[str, ...], str] = {
    ("16-mixed", "16-true"): (
        "fp16 f16 float16 fp16-mixed float16-mixed mixed-float16 mixed-fp16 fp16-amp amp-fp16 amp-float16 f16-mixed "
        "half-mixed mixed-half 16-amp amp-16 16bit 16-bit 16bit-mixed 16-bit-mixed o1 native-amp apex"
    ),
    ("16-mixed", "bf16-mixed"): "amp mixed autocast mixed-precision automatic-mixed-precision",
    (
        "16-master",
    ): "o2 fp16-master float16-master f16-master half-master master-fp16 master-float16 fp16-o2 16bit-master",
    ("bf16-master",): "bfloat16-master master-bf16 master-bfloat16",
    ("16-true",): "half half-true fp16-true float16-true f16-true true-float16 fp16-pure pure-fp16 16bit-true o3",
    ("bf16-mixed", "bf16-true"): (
        "bfloat16 bfloat bf-16 b16 brain-float bfloat16-mixed mixed-bfloat16 mixed-bf16 amp-bf16 amp-bfloat16 bf16-amp "
        "autocast-bf16"
    ),
    ("bf16-true",): "bfloat16-true true-bfloat16 bf16-pure pure-bf16 pure-bfloat16",
    ("32-true",): "no none off full fp32 f32 float32 float single fp32-true float32-true 32bit 32-bit amp-fp32 o0",
    ("64-true",): "fp64 f64 float64 double fp64-true float64-true double-true 64bit 64-bit",
    ("transformer-engine", "fp8-reference"): (
        "fp8 f8 float8 fp8-mixed fp8-hybrid amp-fp8 te te-fp8 fp8-te e4m3 e5m2 fp8-e4m3 fp8-e5m2 float8-e4m3fn msamp "
        "ms-amp transformer-engine-float16 transformerengine fp8-delayed"
    ),
    ("fp8-current-reference", "transformer-engine"): "fp8-current fp8-tensorwise float8-tensorwise",
    ("mxfp8-reference", "transformer-engine"): "mxfp8 mx-fp8 mx8",
    ("nvfp4-reference", "transformer-engine"): "nvfp4 nv-fp4 nvfp4-mixed",
    ("nf4", "fp4"): "4 4bit 4-bit load-in-4bit bnb-4bit bnb bitsandbytes",
    ("nf4",): "qlora normalfloat4 normal-float4 bnb-nf4",
    ("nf4-dq",): "bnb-nf4-dq double-quant",
    ("fp4",): "bnb-fp4 float4",
    ("fp4-dq",): "bnb-fp4-dq",
    ("int8",): "8bit 8-bit load-in-8bit bnb-8bit bnb-int8 llm-int8 llm.int8 llm.int8() i8",
    ("int8-training",): "bnb-int8-training",
}
"""(the mode that is meant, and what else may be) -> names of it, in lower case with dashes."""

_REMARKS = {
    "16-true": "has float16 weights, too",
    "bf16-true": "has bfloat16 weights, too",
    "bf16-mixed": "computes in bfloat16, and needs no loss scaling",
    "fp8-reference": "computes FP8's values in plain torch, on any device",
    "transformer-engine": "computes on GPUs that have the format",
    "fp4": "is bitsandbytes' other 4-bit format",
}
_NO_MODES = {
    "auto": '; Fabric(precision="auto") takes what precision choose wrote for a model; else "bf16-mixed" is right '
    'where supports("bf16-mixed", device) says native, "16-mixed" on another GPU, "32-true" on a CPU',
    "tf32": '; TF32 is how float32 products are computed: Fabric(precision="32-true", tf32=True)',
}
_BY_NAME = {name: modes for modes, names in ELSEWHERE.items() for name in names.split()}

_FORMAT = r"(mxfp|nvfp|bfloat|float|bf|fp|nf|int|uint|f)?-?(\d+)(?!\d)"  # compiled when a name is wrong
_CANONICAL = {"bfloat": "bf", "float": "", "fp": "", "f": "", None: ""}
_BITS = {"16", "32", "64", "8", "4"}


def hint(given: str, modes: Collection[str], package_of: Callable[[str], str | None] = lambda _: None) -> str:
    """Returns `'; did you mean "..."?'` of `modes` for a name that none of them has, with what else it may mean.

    `package_of` gives the package that brings a mode; None: core does, or an unknown package.
    """
    name = re.sub(r"[\s_]+", "-", given.strip().lower()).removeprefix("torch.").replace("bnb.", "bnb-")
    if name in _NO_MODES:
        return _NO_MODES[name]
    if name not in _BY_NAME:
        name = re.sub(r"(?<=[a-z])-(?=\d)", "", name)  # "fp-16"
    meant = [mode for mode in _BY_NAME.get(name, ()) if mode in modes]
    if meant:
        package = package_of(meant[0])
        more = [f"of {package}"] if package else []
        more += [f'"{mode}" {_REMARKS[mode]}' for mode in meant[1:] if mode in _REMARKS]
        return f'; did you mean "{meant[0]}"?' + (f" ({'; '.join(more)})" if more else "")
    if name in _BY_NAME:
        return ""
    wanted = _format(name)
    return nearest(name, [mode for mode in modes if wanted is None or _is_format(mode, *wanted)])


def _format(name: str) -> tuple[str | None, str] | None:
    """Returns what a name says of the number format, a prefix and the number of bits; None: nothing.

    Of an unknown number of bits the prefix is None: its digits may be swapped, in whatever format.
    """
    found = re.match(_FORMAT, name)
    if found is None:
        return None
    if found[1] == "nf":  # of one number of bits only
        return "nf", "4"
    return (_CANONICAL.get(found[1], found[1]) if found[2] in _BITS else None), found[2]


def _is_format(mode: str, prefix: str | None, bits: str) -> bool:
    own = _format(mode)
    if own is None or prefix is None:
        return own is not None and sorted(own[1]) == sorted(bits)
    return own == (prefix, bits)
