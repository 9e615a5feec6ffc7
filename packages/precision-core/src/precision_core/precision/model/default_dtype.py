"""Created tensors get the dtype: a thread-local function mode in place of torch's process-wide default dtype.

Inside `created_as(dtype)`, whatever torch would give its default dtype gets `dtype`: factories that were called without
one (`torch.zeros(3)`, `torch.tensor([0.5])`) and arithmetic that makes floats of integers (`torch.arange(4) / 3`).
A dtype that the user wrote (`dtype=`, `.float()`, `.to(...)`) and whatever follows from a floating input stays.

Out of reach is what torch hides from function modes: the old `torch.Tensor(...)` and `torch.range`, scripted functions,
Python code that reads `torch.get_default_dtype()` itself (`torch.signal.windows`, `torch.distributions` of numbers),
and `torch.normal` of numbers under torch.compile, which dynamo (2.13) does not show to modes: `torch.randn` it does.
A function mode is also off in backward, where activation checkpoints run parts of forward again. They want it passed:
`checkpoint(..., use_reentrant=False, context_fn=lambda: (nullcontext(), precision.forward_context()))`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import (
    _get_function_stack_at,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from precision_core.policy.casting import cast_dtype
from precision_core.precision.model.aligned import ALIGNED, aligned

T = TypeVar("T")

_FACTORIES = frozenset(
    {
        *(getattr(torch, name) for name in ("empty", "empty_strided", "empty_permuted", "zeros", "ones", "eye")),
        *(getattr(torch, name) for name in ("rand", "randn", "normal", "linspace", "logspace")),
        *(getattr(torch, f"{name}_window") for name in ("bartlett", "blackman", "hamming", "hann", "kaiser")),
        torch.fft.fftfreq,
        torch.fft.rfftfreq,
    }
)
"""Always floating without a dtype. The random ones must get it up front: running them twice would draw twice."""

_OF_NUMBERS = frozenset({torch.full, torch.scalar_tensor, torch.arange})
"""Floating only when their numbers are: one beyond the default dtype's range must not be created in that first."""

_INFERRING = frozenset(
    {
        *_OF_NUMBERS,
        *(torch.tensor, torch.as_tensor, torch.asarray, torch.sparse_coo_tensor, torch.sparse_compressed_tensor),
        *(getattr(torch, f"sparse_{name}_tensor") for name in ("csr", "csc", "bsr", "bsc")),
    }
)
"""Floating only when the values are."""

_BOUNDS = frozenset(
    getattr(owner, name) for owner in (torch, Tensor) for name in ("clamp", "clip", "clamp_min", "clamp_max")
)
"""Here torch makes the numbers tensors of the default dtype first, as it does for torch.where."""

_EXPLICIT = frozenset(
    {
        *(getattr(Tensor, name) for name in ("double", "float", "half", "bfloat16", "cdouble", "cfloat", "chalf")),
        *(Tensor.type, Tensor.dequantize, torch.dequantize),
    }
)
"""The name, or the data, says which dtype. Where the caller passes one, `_any_dtype` finds it."""

_IS_TRACED = torch.__version__ >= "2.12"
"""Older ones call factories whose arguments are all constants without asking the function mode."""

_CONDITIONAL = frozenset({torch.where, Tensor.where})


def _complete_factories() -> None:
    """Has torch list its factories now, and once more if its list lacks some.

    By that list torch.compile decides which calls a mode that is entered inside the compiled function sees, and torch
    makes it once in a process. transformers' `from_pretrained` puts a function of its own in place of torch.linspace
    while it runs: a list made then lacks torch.linspace for good, whose result would silently be float32.
    """
    if not {torch.linspace, torch.zeros} <= _device_constructors():
        _device_constructors.cache_clear()
        if dynamo := sys.modules.get("torch._dynamo.variables.torch"):
            dynamo.get_overridable_functions.cache_clear()
        _device_constructors()


_complete_factories()


class created_as(TorchFunctionMode):
    """Context in which tensors that torch would create in its default dtype are created in `dtype`.

    Complex ones become complex128 under float64, and stay complex64 under any other. Thread-local, re-entrant, restored
    on exceptions, and traced by torch.compile from torch 2.12 on.

    With `aligns`, for models that hold tensors of several dtypes, calls that torch refuses for operands of several
    dtypes (matrix products, norms, writes to indices) cast them: to the dtype of the parameter among them, else to
    `dtype`; what is written, to that of what it is written to. What torch takes as it is stays as it is.

    Raises:
        RuntimeError: in a call that an older torch compiles.
    """

    def __init__(self, dtype: torch.dtype, aligns: bool = False) -> None:
        if not _IS_TRACED and _is_inside_compiled_call():
            raise RuntimeError(
                f"torch.compile of torch {torch.__version__} leaves tensors that forward creates in the default dtype: "
                "compile true modes with torch 2.12 or newer, or use a mixed mode [compiled-true-mode]"
            )
        super().__init__()
        self.dtype = dtype
        self.aligns = aligns

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.aligns and func in ALIGNED:
            args, kwargs = aligned(func, args, kwargs, self.dtype)
        if func in _FACTORIES and _leaves_dtype_open(func, args, kwargs):
            return func(*args, **{**kwargs, "dtype": self.dtype})
        if func in _OF_NUMBERS and _leaves_dtype_open(func, args, kwargs):
            if (number := self._widest_number((*args, *kwargs.values()))) is not int:
                return func(*args, **{**kwargs, "dtype": self._dtype_for(number)})
        elif (func in _CONDITIONAL or func in _BOUNDS) and _only_numbers_float(args, kwargs):
            return func(*self._widen(args, func), **self._widen(kwargs, func))
        out = func(*args, **kwargs)
        # Nearly always the result is in self.dtype already, and this comparison is all that the mode costs.
        if type(out) is not Tensor or out.dtype is self.dtype or not (out.is_floating_point() or out.is_complex()):
            return out
        if func in _EXPLICIT or type(func) not in _TORCH_CALLS or _any_dtype(args, kwargs):
            return out
        wanted = self._dtype_for(complex if out.is_complex() else float)
        if func in _INFERRING:
            return out if _typed_data(args, kwargs) else func(*args, **{**kwargs, "dtype": wanted})
        if _any_floating(args) or _any_floating(kwargs):
            return out
        # Integers became floats. In a wider dtype compute them again: a cast could not bring the digits back.
        if torch.promote_types(wanted, out.dtype) is wanted is not out.dtype:
            return func(*self._widen(args, func), **self._widen(kwargs, func)).to(wanted)
        return out.to(wanted)

    def _widest_number(self, values: tuple[Any, ...]) -> type:
        """Returns complex, float or int: what is widest among the numbers, and tensors whose values the dtype holds.

        Of a wider tensor torch's default dtype stays: its value may be beyond the narrow one.
        """
        found = [_widest_number(values)]
        for value in values:
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                number = complex if value.is_complex() else float
                wanted = self._dtype_for(number)
                if torch.promote_types(value.dtype, wanted) is wanted:
                    found.append(number)
        return max(found, key=(int, float, complex).index)

    def _dtype_for(self, number: type) -> torch.dtype:
        return cast_dtype(torch.complex64, self.dtype) if number is complex else self.dtype

    def _widen(self, tree: Any, func: Callable[..., Any]) -> Any:
        """Returns the arguments with integers (for torch.where: its Python floats, not the condition) in self.dtype."""
        if isinstance(tree, Tensor):
            return tree if func in _CONDITIONAL else tree.to(self.dtype)
        if isinstance(tree, float) and func in _CONDITIONAL:
            return torch.scalar_tensor(tree, dtype=self.dtype)
        if isinstance(tree, dict):
            return {key: self._widen(value, func) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(self._widen(value, func) for value in tree)
        return tree


def outside_created_as(function: Callable[..., T]) -> Callable[..., T]:
    """Returns `function` as it runs outside of `created_as`: for an engine's hooks, which run inside of forward.

    A mode costs some microseconds in each call of torch, and a hook may make dozens. Other modes and tensor subclasses
    see the calls as ever. Keyword arguments are not passed on.
    """

    def outside(*args: Any) -> T:
        depth = _len_torch_function_stack()
        if not depth or type(_get_function_stack_at(depth - 1)) is not created_as:
            return function(*args)
        mode = _pop_torch_function_stack()
        try:
            return function(*args)
        finally:
            _push_on_torch_function_stack(mode)

    return outside


def _is_inside_compiled_call() -> bool:
    """Whether torch.compile traces this, or would trace what is called from here."""
    return torch.compiler.is_compiling() or callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())


_TORCH_CALLS = (type(torch.zeros), type(torch.Tensor.add), type(torch.Tensor.sum), type(torch.split))
"""torch's own functions and methods. Operators called through torch.ops say themselves what dtype they return."""


def _leaves_dtype_open(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> bool:
    if kwargs.get("dtype") is not None or kwargs.get("out") is not None:
        return False
    return func is not torch.normal or not any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))


def _typed_data(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the data of torch.tensor and its like carries a floating dtype (tensors, arrays)."""
    values = [*args, *kwargs.values()]
    while values:
        value = values.pop()
        if isinstance(value, Tensor):
            if _any_floating(value):
                return True  # an integer one is a size, a limit or an index
        elif hasattr(value, "dtype"):
            if getattr(value.dtype, "kind", "f") not in "iub":  # numpy's letters for integers and bool
                return True
        elif isinstance(value, (list, tuple)):
            values.extend(value[:1])  # the first element speaks for the list
    return False


def _widest_number(values: tuple[Any, ...]) -> type:
    """Returns complex, float or int: what is widest among the Python (and numpy's float64) numbers."""
    if any(isinstance(value, complex) for value in values):
        return complex
    return float if any(isinstance(value, float) for value in values) else int


def _only_numbers_float(args: Any, kwargs: dict[str, Any]) -> bool:
    return _widest_number((*args, *kwargs.values())) is float and not (_any_floating(args) or _any_floating(kwargs))


def _any_dtype(args: Any, kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))


def _any_floating(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return tree.is_floating_point() or tree.is_complex()
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return any(_any_floating(value) for value in values)
