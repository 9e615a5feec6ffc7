"""TF32: whether CUDA multiplies float32 tensors with 10 of their 23 bits, in cuBLAS, cuDNN's convolutions and RNNs.

torch allows it for convolutions and RNNs unless it is told otherwise, which is no float32. The settings are the
process's, in an old form (`allow_tf32`, `set_float32_matmul_precision`) and a new one (`fp32_precision`). Setting one
alone makes questions for the other raise, in user code and in torch's own compiler, so here both are set wherever they
agreed; only the new one where a user has used only that.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.backends import cudnn

_matmul, _conv, _rnn, _mkldnn = (
    torch.backends.cuda.matmul,
    cudnn.conv,  # type: ignore[attr-defined]
    cudnn.rnn,  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
)

Products = Callable[..., AbstractContextManager[Any]]
"""What makes the context, and enters another in it where it is given one."""
Restore = Callable[[], None]


class Tf32(AbstractContextManager[None]):
    """Context in which products of float32 may be computed in TF32, or may not; any context `inner` is entered in it.

    It may be entered again, also inside of itself. What torch.compile traces leaves the settings alone: they are those
    of whoever calls what it makes.
    """

    def __init__(self, allowed: bool, inner: AbstractContextManager[Any] | None = None) -> None:
        self._allowed = allowed
        self._inner = inner
        self._restores: list[tuple[Restore, Restore]] = []

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():
            self._restores.append((_set_matmul(self._allowed), _set_cudnn(self._allowed)))
        if self._inner is not None:
            self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            if self._inner is not None:
                self._inner.__exit__(*error)
        finally:
            if not torch.compiler.is_compiling():
                for restore in self._restores.pop():
                    restore()


PRODUCTS: dict[str, Callable[[bool], Products]] = {"cuda": lambda allowed: functools.partial(Tf32, allowed)}
"""Device type -> what makes the context of each forward and backward; other devices compute float32 in float32."""


def products(device_type: str, allowed: bool) -> Products:
    """Returns what makes the context for devices of that type; `nullcontext` where there is nothing to set."""
    if type(allowed) is not bool:
        raise ValueError(f"Fabric(tf32={allowed!r}): expected True or False")
    return PRODUCTS[device_type](allowed) if device_type in PRODUCTS else nullcontext


def make_forward(module: nn.Module, context: Products, allowed: bool) -> Callable[[Callable[..., Any]], Any]:
    """Returns what puts a method of `module`, or of what compiled it, into the context."""
    has_cudnn = any(isinstance(each, (nn.modules.conv._ConvNd, nn.RNNBase)) for each in module.modules())

    @torch.compiler.assume_constant_result  # runs while torch.compile traces
    def check() -> None:
        if not allowed and (_matmul.fp32_precision == "tf32" or (has_cudnn and _conv.fp32_precision == "tf32")):
            warnings.warn(
                "this model was compiled after fabric.setup, and TF32 is allowed: its products of float32 are not "
                "computed in float32. Pass fabric.setup(torch.compile(model)), or set "
                "torch.backends.cudnn.allow_tf32 = False; or say Fabric(tf32=True)",
                stacklevel=2,
            )

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                check()
                return function(self, *args, **kwargs)
            with context():
                return function(self, *args, **kwargs)

        return forward

    return make


def _set_matmul(allowed: bool) -> Restore:
    before = _matmul.fp32_precision
    if (before == "tf32") is allowed:
        return _nothing
    old = _quietly(torch.get_float32_matmul_precision)
    before = _unset_if_inherited(before)
    if old is not None:
        _matmul.allow_tf32 = allowed
    _matmul.fp32_precision = "tf32" if allowed else "ieee"

    def restore() -> None:
        if old == "medium":  # which says something of oneDNN's products, too
            onednn = _mkldnn.fp32_precision
            torch.set_float32_matmul_precision(old)
            _mkldnn.fp32_precision = onednn
        elif old is not None:
            _matmul.allow_tf32 = old == "high"
        _matmul.fp32_precision = before

    return restore


def _set_cudnn(allowed: bool) -> Restore:
    before = _conv.fp32_precision, _rnn.fp32_precision
    if all((each == "tf32") is allowed for each in before):
        return _nothing
    old = _quietly(lambda: cudnn.allow_tf32)
    conv, rnn = map(_unset_if_inherited, before)
    if old is not None:
        cudnn.allow_tf32 = allowed
    _conv.fp32_precision = _rnn.fp32_precision = "tf32" if allowed else "ieee"

    def restore() -> None:
        if old is not None:
            cudnn.allow_tf32 = old
        _conv.fp32_precision, _rnn.fp32_precision = conv, rnn

    return restore


def _unset_if_inherited(value: str) -> str:
    """Returns how to set what reads as `value` so that it goes on following `torch.backends.fp32_precision`."""
    return "none" if cudnn.fp32_precision == value else value


_told = False


def _quietly(question: Callable[[], Any]) -> Any:
    """Returns what the old form of a setting says; None where it disagrees with the new one.

    torch 2.9 warns of the old form once in a process: here, where nobody is to read it.
    """
    global _told
    try:
        if _told:
            return question()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = question()
        _told = True
        return answer
    except RuntimeError:
        return None


def _nothing() -> None:
    pass
