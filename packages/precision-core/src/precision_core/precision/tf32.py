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
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

_backends: Any = torch.backends  # whose stubs lack the new form
_cudnn, _conv, _rnn = _backends.cudnn, _backends.cudnn.conv, _backends.cudnn.rnn
_matmul, _onednn_matmul = _backends.cuda.matmul, _backends.mkldnn.matmul

MakeContext = Callable[..., AbstractContextManager[Any]]
"""What makes the context, and enters another in it where it is given one."""
Restore = Callable[[], None]


class Tf32(AbstractContextManager[None]):
    """Context in which products of float32 may be computed in TF32, or may not; any context `inner` is entered in it.

    It may be entered again, also inside of itself. Not for what torch.compile traces: that leaves the settings alone,
    and runs in those of whoever calls what was compiled.
    """

    def __init__(self, allowed: bool, inner: AbstractContextManager[Any] | None = None) -> None:
        self._allowed = allowed
        self._inner = inner
        self._restores: list[tuple[Restore | None, Restore | None]] = []
        _no_warning()

    def __enter__(self) -> None:
        self._restores.append((_set_matmul(self._allowed), _set_cudnn(self._allowed)))
        if self._inner is not None:
            try:
                self._inner.__enter__()
            except BaseException:
                self._restore()
                raise

    def __exit__(self, *error: Any) -> None:
        try:
            if self._inner is not None:
                self._inner.__exit__(*error)
        finally:
            self._restore()

    def _restore(self) -> None:
        for restore in self._restores.pop():
            if restore is not None:
                restore()


CONTEXTS: dict[str, Callable[[bool], MakeContext]] = {"cuda": lambda allowed: functools.partial(Tf32, allowed)}
"""Device type -> what makes the context of each forward and backward; other devices compute float32 in float32."""


def tf32_context(device_type: str, allowed: bool) -> MakeContext:
    """Returns what makes the context for devices of that type; `nullcontext` where there is nothing to set."""
    if type(allowed) is not bool:
        raise ValueError(f"Fabric(tf32={allowed!r}): expected True or False")
    return CONTEXTS[device_type](allowed) if device_type in CONTEXTS else nullcontext


def make_forward(module: nn.Module, context: MakeContext, allowed: bool) -> Callable[[Callable[..., Any]], Any]:
    """Returns what puts a method of `module`, or of what compiled it, into the context."""
    has_cudnn = any(isinstance(each, (nn.modules.conv._ConvNd, nn.RNNBase)) for each in module.modules())

    @torch.compiler.assume_constant_result  # runs while torch.compile traces
    def check() -> None:
        if not allowed and (_matmul.fp32_precision == "tf32" or (has_cudnn and _conv.fp32_precision == "tf32")):
            warnings.warn(
                "this model was compiled after fabric.setup, or in place, and TF32 is allowed: its products of float32 "
                "are not computed in float32. Pass fabric.setup(torch.compile(model)), or set "
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


def _set_matmul(allowed: bool) -> Restore | None:
    """Sets what products of matrices may do; returns what gives the settings back, None where they are so already."""
    try:
        if _matmul.allow_tf32 is allowed:  # the old form costs a third of the new one, and agrees with it or raises
            return None
    except RuntimeError:
        if (_matmul.fp32_precision == "tf32") is allowed:
            return None
    before = _unset_if_inherited(_matmul.fp32_precision)
    try:
        old: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = None
    else:
        _matmul.allow_tf32 = allowed
    _matmul.fp32_precision = "tf32" if allowed else "ieee"

    def restore() -> None:
        if old == "medium":  # which says something of oneDNN's products, too
            onednn = _onednn_matmul.fp32_precision
            torch.set_float32_matmul_precision(old)
            _onednn_matmul.fp32_precision = onednn
        elif old is not None:
            _matmul.allow_tf32 = old == "high"
        _matmul.fp32_precision = before

    return restore


def _set_cudnn(allowed: bool) -> Restore | None:
    """Sets what convolutions and RNNs may do, as `_set_matmul` does."""
    try:
        old: bool | None = _cudnn.allow_tf32
    except RuntimeError:
        old = None
        if all((each.fp32_precision == "tf32") is allowed for each in (_conv, _rnn)):
            return None
    if old is allowed:
        return None
    if old and _cudnn.fp32_precision != "tf32":  # torch's own setting: the short way
        _cudnn.allow_tf32 = False
        return _allow_cudnn
    conv, rnn = (_unset_if_inherited(each.fp32_precision) for each in (_conv, _rnn))
    if old is not None:
        _cudnn.allow_tf32 = allowed
    _conv.fp32_precision = _rnn.fp32_precision = "tf32" if allowed else "ieee"

    def restore() -> None:
        if old is not None:
            _cudnn.allow_tf32 = old
        _conv.fp32_precision, _rnn.fp32_precision = conv, rnn

    return restore


def _allow_cudnn() -> None:
    _cudnn.allow_tf32 = True


def _unset_if_inherited(value: str) -> str:
    """Returns how to set what reads as `value` so that it goes on following `torch.backends.fp32_precision`."""
    return "none" if _cudnn.fp32_precision == value else value


@functools.cache
def _no_warning() -> None:
    """Has torch 2.9 warn of the old form, which it does once in a process, where nobody is to read it."""
    with warnings.catch_warnings(), suppress(RuntimeError):
        warnings.simplefilter("ignore")
        _ = _cudnn.allow_tf32
