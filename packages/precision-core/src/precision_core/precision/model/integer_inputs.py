"""Integer inputs of layers that compute in floating point: torch says "Long and BFloat16", this names layer and input.

No mode casts integers, which may be ids, targets or masks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from precision_core.policy.dtypes import dtype_name
from precision_core.policy.policy import Policy

SAYS_DTYPES = re.compile(r"dtype|datatype|scalar type|not implemented for|should be the same", re.IGNORECASE)
_SAYS_INTEGERS = re.compile(
    r"\b(Long|Int|Short|Byte|Char|Bool|long|int|short|bool|(un)?signed char|torch\.(u?int\d+|bool))\b"
)
_WANTS_INTEGERS = re.compile(r"indices|index|expected [\w ]*(scalar type|dtype)( to be)? (Long|Int|Byte|Bool)\b", re.I)


def explained(error: Exception, root: nn.Module, policy: Policy) -> Exception | None:
    """Returns an error of the same type that names layer and input, where integer inputs caused `error`; else None.

    Args:
        error: what a forward of `root` raised.
        root: the model that was set up.
        policy: in which it runs.
    """
    text = str(error)
    if not SAYS_DTYPES.search(text) or _WANTS_INTEGERS.search(text):
        return None
    layer, given = None, {}
    for frame_layer, arguments in _calls(error.__traceback__):
        layer, given = frame_layer, arguments
    integers = {name: tensor.dtype for name, tensor in given.items() if _is_integer(tensor)}
    if layer is None or not integers:
        return None
    if not _SAYS_INTEGERS.search(text) and not ("mixed dtype" in text and _is_integer(next(iter(given.values())))):
        return None  # torch's norms do not say which
    name = next((name for name, module in root.named_modules() if module is layer), "")
    where = f"its layer {name} ({type(layer).__name__})" if name else "it"
    what = ", ".join(f"{key} in {dtype_name(dtype)}" for key, dtype in integers.items())
    compute = dtype_name(policy.for_module(name).compute)
    message = (
        f"{type(root).__name__} runs in {policy.flat}, and {where} was given {what} where it computes in {compute}. "
        "Integers are not cast, since they may be ids, targets or masks: pass x.float() (images: x.float() / 255), or "
        "look ids up in an nn.Embedding first"
    )
    kind = type(error) if isinstance(error, (NotImplementedError, ValueError)) else RuntimeError
    return kind(message)


def _calls(traceback: TracebackType | None) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """Yields the modules whose methods the traceback passes through, with the tensors that they were given."""
    while traceback is not None:
        frame = traceback.tb_frame
        code, values = frame.f_code, frame.f_locals
        owner = values.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and code.co_name not in ("_call_impl", "_wrapped_call_impl", "__call__"):
            names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
            tensors = {name: values[name] for name in names if isinstance(values.get(name), Tensor)}
            if tensors:
                yield owner, tensors
        traceback = traceback.tb_next


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
