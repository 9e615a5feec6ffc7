"""Every operation of a forward and backward: those that gave inf or NaN, and whether that came from an operand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from precision_lab.auditing.kinds import kind_of
from precision_lab.auditing.names import clean
from precision_lab.auditing.where import Line, Where
from precision_lab.explaining.numbers import Numbers, is_finite, local, numbers_of, tensors, words

FORWARD, LOSS, BACKWARD = "forward", "loss", "backward"
IN_LOSS = "(loss)"
"""The path of what computes the loss, outside of the model."""
_VIEWS = frozenset(
    [
        "t",
        "detach",
        "view",
        "alias",
        "_unsafe_view",
        "unsqueeze",
        "squeeze",
        "permute",
        "transpose",
        "as_strided",
        "slice",
    ]
)
_VIEWS |= frozenset(
    ["select", "expand", "reshape", "split", "unbind", "clone", "lift_fresh", "split_with_sizes", "chunk"]
)
_UNWRITTEN = words("empty empty_like empty_strided new_empty new_empty_strided resize_")
_OVERWRITING = words("copy_ fill_ zero_ uniform_ normal_ bernoulli_ random_ exponential_")
"""In place, and without a look at what was there, which may be anything."""


@dataclass
class Went:
    """An operation that gave a value that is not finite, or took one."""

    number: int  # of all operations, in order
    name: str  # aten's: "addmm"
    module: str
    phase: str
    line: Line | None
    forward: str  # in backward: the forward operation whose gradient it computes
    inputs: list[Numbers]
    output: Numbers
    parents: list[Went | str] = field(default_factory=list)  # operations, or names of leaves, of operands not finite
    wide: Numbers | None = None  # the output of this operation on the same operands in float64
    scalars: tuple[float, ...] = ()
    kind: str = ""  # of auditing's kinds
    same: bool = False  # whether its two operands are one tensor, as in x * x

    @property
    def took_labels(self) -> bool:
        """Whether it is of the loss, and was given something else than the model's output that was not finite."""
        return self.phase == LOSS and "" in self.parents


class Modules:
    """The module whose forward runs, by hooks on all modules."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.names = {id(module): clean(path) for path, module in root.named_modules()}
        self.stack: list[str] = []
        self.outside = ""  # the path where no module runs

    @property
    def path(self) -> str:
        """The innermost module's path."""
        return self.stack[-1] if self.stack else self.outside

    @contextmanager
    def followed(self) -> Iterator[Modules]:
        """Context in which the path is kept."""
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            yield self

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        outer = self.path
        self.stack.append(self.names.get(id(module), outer))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.stack:
            self.stack.pop()


class Watched(TorchDispatchMode):
    """The mode under which a step is run once more; `first` has operations by the storage that they wrote last."""

    def __init__(self, modules: Modules) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.modules = modules
        self.went: list[Went] = []
        self.phase = FORWARD
        self.forward_ended = 0  # the last operation's number
        self.unseen: list[str] = []
        self.leaves: dict[int, str] = {}  # storage -> what the user calls it
        self._writers: dict[int, Went] = {}
        self._nodes: dict[int, tuple[str, str, Line | None]] = {}  # number of an autograd node -> where it was made
        self._where = Where()
        self.number = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code is run as it is."""
        return True

    def writer(self, tensor: Tensor) -> Went | str | None:
        """Returns the operation that wrote a tensor's value that is not finite, or the name of a leaf."""
        key = storage_of(tensor)
        return self._writers.get(key) or self.leaves.get(key)

    def place(self, node: Any) -> tuple[str, str, str, Line | None]:
        """Returns the phase, in backward the forward operation, the module and the line of what runs now."""
        if node is not None and not self.modules.stack:  # else a checkpoint runs its forward once more
            forward, module, line = self._nodes.get(node._sequence_nr(), ("", "", None))
            own = not node.name()[-1].isdigit()  # a Function of Python: what its forward called is not what runs
            return BACKWARD, _plain(node.name()) if own or not forward else forward, module, line
        return self.phase, "", self.modules.path, self._where.line(4)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and not isinstance(args[0], Tensor):
            return args[0]
        self.number += 1
        name = func._schema.name.partition("::")[2]
        # Batch norm's operation writes its statistics, which its schema does not say.
        before = _with_clones(args) if func._schema.is_mutable or "batch_norm" in name else args
        result = func(*args, **kwargs)
        node = torch._C._current_autograd_node()
        if node is None or self.modules.stack:
            made = torch._C._autograd._get_sequence_nr() - 1  # by this operation, or the one before
            if made not in self._nodes:
                self._nodes[made] = name, self.modules.path, self._where.line(2)
        if name not in _UNWRITTEN:
            try:
                self._note(func, name, args, before, kwargs, result, node)
            except Exception as error:  # a step of anybody's: an operand may be anything
                self.unseen.append(f"{name}: {type(error).__name__}: {error}")
        return result

    def _note(self, func: Any, name: str, args: Any, before: Any, kwargs: Any, result: Any, node: Any) -> None:
        bad = [each for each in tensors(result) if not is_finite(each)]
        if not bad:
            for each in tensors(result):
                if each.numel() * each.element_size() >= _size(each):
                    self._writers.pop(storage_of(each), None)
            return
        overwritten = 1 if name in _OVERWRITING else 0
        operands = list(tensors((before, kwargs)))[overwritten:]
        given = list(tensors((args, kwargs)))[overwritten:]
        parents = [number for number, each in enumerate(operands) if not is_finite(each)]
        known = [self.writer(given[number]) or "" for number in parents]
        if name in _VIEWS and len(known) == 1 and isinstance(known[0], Went):
            for each in bad:
                self._writers[storage_of(each)] = known[0]
            return
        phase, forward, module, line = self.place(node)
        shown = [numbers_of(each) for each in operands if each.is_floating_point() or each.is_complex()]
        went = Went(self.number, name, module, phase, line, forward, shown, numbers_of(bad[0]), known)
        went.kind = kind_of(func)
        went.same = len(given) > 1 and given[0].data_ptr() == given[1].data_ptr() and given[0].shape == given[1].shape
        went.scalars = tuple(float(each) for each in args if isinstance(each, (int, float)))
        if not parents:
            went.wide = in_float64(func, before, kwargs)
        for each in bad:
            self._writers[storage_of(each)] = went
        self.went.append(went)


def in_float64(func: Any, args: Any, kwargs: Any) -> Numbers | None:
    """Returns what the operation gives on the same operands in float64; None where it does not run so."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to(torch.float64) if value.is_floating_point() else value.detach().clone()
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        if isinstance(value, (list, tuple)):
            return type(value)(widen(each) for each in value)
        return value

    with contextlib.suppress(Exception):  # a kernel that has no float64, or that checks dtypes
        result = func(*widen(args), **{key: widen(each) for key, each in kwargs.items()})
        first = next((each for each in tensors(result) if not is_finite(each)), None)
        return numbers_of(first if first is not None else next(tensors(result)))
    return None


def _with_clones(args: Any) -> Any:
    if isinstance(args, Tensor):
        return args.detach().clone() if args.layout is torch.strided and not args.is_meta else args
    return type(args)(_with_clones(each) for each in args) if isinstance(args, (list, tuple)) else args


def storage_of(tensor: Tensor) -> int:
    try:
        return local(tensor).untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return -id(tensor)


def _size(tensor: Tensor) -> int:
    try:
        return local(tensor).untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return 0


def _plain(node: str) -> str:
    """LogSoftmaxBackward0 -> LogSoftmax."""
    return node.partition("Backward")[0]


# torch wraps what a mode does in torch._dynamo.disable, whose import takes seconds. Here nothing is compiled.
Watched.__torch_dispatch__ = getattr(Watched.__torch_dispatch__, "__wrapped__", Watched.__torch_dispatch__)  # type: ignore[method-assign]
