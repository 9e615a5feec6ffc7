"""Guard: finds optimizer steps and changes of gradients while the gradients are still multiplied by the loss scale.

Three ways. A hook of torch's runs before each `Optimizer.step` of the process while gradients carry a scale, in
backward too. A gradient's version counter tells that it was changed since its backward, a parameter's that it was
updated. Reading a gradient cannot be detected, nor a change through `p.grad.data`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from itertools import chain
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from precision_core.scaling.gradients import params_of

T = TypeVar("T")


_left: list[RemovableHandle] = []
"""Hooks whose owners were collected during a step; the next hook that is added removes them."""


def _remove_left() -> None:
    while _left:
        _left.pop().remove()


class StepHook(Generic[T]):
    """Has `check(owner, optimizer)` called before each optimizer step of the process, from `add` to `remove`.

    It does not keep `owner` alive, and ends with it.
    """

    def __init__(self, owner: T, check: Callable[[T, Optimizer], None]) -> None:
        self._owner = ref(owner)
        self._check = check
        self._handle: RemovableHandle | None = None
        weakref.finalize(owner, self._end).atexit = False

    def add(self) -> None:
        _remove_left()
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._before_step)

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _end(self) -> None:
        """Removes the hook, not while torch may be going through its hooks: garbage is collected at any time."""
        if self._handle is not None:
            _left.append(self._handle)
            self._handle = None
            if next(stepping(), None) is None:
                _remove_left()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        owner = self._owner()
        if owner is not None:
            self._check(owner, optimizer)


class Snapshot:
    """Gradients of an optimizer as a backward left them; holds none of them alive.

    torch counts no versions where it changes several sharded gradients at once, as its clip_grad_norm_ does. With
    `shards` a few values of each are kept. Comparing them is a host sync, so that is for a run's first steps: a loop
    clips in each step, or in none.
    """

    def __init__(self, optimizer: Optimizer, shards: bool = False) -> None:
        self._seen = [
            (ref(gradient), gradient._version, param._version) if (gradient := param.grad) is not None else None
            for group in optimizer.param_groups
            for param in group["params"]
        ]
        self._samples = [_sample(param.grad) for param in params_of(optimizer)] if shards else []

    def changed(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """Returns the parameters whose gradients were changed or replaced; None and zeros are right at any scale."""
        changed = [
            param
            for param, seen in zip(params_of(optimizer), self._seen, strict=False)  # groups may have been added
            if (gradient := param.grad) is not None
            and (seen is None or seen[0]() is not gradient or seen[1] != gradient._version)  # type: ignore[union-attr]
        ]
        pairs = [
            (param, sample, now)
            for param, sample in zip(params_of(optimizer), self._samples, strict=False)
            if sample is not None and (now := _sample(param.grad)) is not None
        ]
        if pairs:  # one read for all
            differ = [now.shape != sample.shape or (now != sample).any() for _, sample, now in pairs]
            flags = torch.stack([torch.as_tensor(each).to(pairs[0][1].device) for each in differ]).tolist()
            changed += [param for (param, _, _), flag in zip(pairs, flags, strict=True) if flag]
        return [param for param in changed if not _is_zero(param.grad)] if changed else changed

    def updated(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """Returns the parameters that had a gradient, and whose values were changed since."""
        pairs = zip(params_of(optimizer), self._seen, strict=False)
        return [param for param, seen in pairs if seen is not None and seen[2] != param._version]


def _sample(gradient: Tensor | None) -> Tensor | None:
    """Returns the bits of a few values of this rank's shard; None where it has none, or is no shard."""
    if gradient is None or not hasattr(gradient, "to_local"):
        return None
    values = gradient.to_local().detach().reshape(-1)
    return values[:: max(1, len(values) // 16)].clone().view(torch.uint8)


def _is_zero(gradient: Tensor | None) -> bool:
    assert gradient is not None
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # ranks need not ask at the same time
    return not (local._values() if local.is_sparse else local).any()


class Unheld:
    """What trains and no known optimizer holds, and which of its gradients carry the scale.

    Parameters of the run's models, and leaves of losses that were scaled: parameters of a model or of a criterion that
    was not set up, and tensors that an optimizer may hold.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._models = models
        self._params: dict[int, ref[nn.Parameter]] = {}
        self._leaves: dict[int, ref[Tensor]] = {}  # of losses, which no model of the run has
        self._before: dict[int, tuple[int, int]] | None = None  # before a backward that has not ended yet
        self._scaled: dict[int, tuple[ref[Tensor], ref[Tensor], int]] = {}  # with the parameter's version

    def __bool__(self) -> bool:
        """Whether there are any, for the usual loop, in which there are none."""
        return bool(self._params or self._leaves or self._scaled)

    def find(self, held: Container[int]) -> None:
        """Looks for them anew: those whose ids are not in `held`."""
        self._params = {id(param): ref(param) for param in self._all() if id(param) not in held}
        known = {id(param) for param in self._all()}
        alive = {key: each for key, each in self._leaves.items() if each() is not None}
        self._leaves = {key: each for key, each in alive.items() if key not in held and key not in known}
        self._scaled = {key: value for key, value in self._scaled.items() if key not in held}

    def find_leaves(self, loss: Tensor, held: Container[int]) -> None:
        """Adds the leaves of `loss` that neither `held` nor the run's models have.

        Not where parameters are sharded: FSDP2's graphs end in the full parameters, whose gradients it takes away.
        """
        params = list(self._all())
        if any(hasattr(param, "device_mesh") for param in params):
            return
        known = {id(param) for param in params}
        new = [leaf for leaf in _leaves_of(loss) if id(leaf) not in known and id(leaf) not in held]
        self._leaves = {key: each for key, each in self._leaves.items() if each() is not None}
        self._leaves |= {id(leaf): ref(leaf) for leaf in new}

    def _all(self) -> Iterator[nn.Parameter]:
        for model in self._models:
            yield from model.parameters()

    def in_run(self, params: Iterable[nn.Parameter]) -> nn.Parameter | None:
        """Returns the first that is a parameter of the run's models, whoever holds it, or a leaf of its losses."""
        everything = {id(param) for param in self._all()}
        leaves = self._leaves
        return next((each for each in params if id(each) in everything or _is(leaves.get(id(each)), each)), None)

    def before_backward(self) -> None:
        """Notes the gradients that are there, to tell the new ones from them."""
        self._before = {id(param): (id(grad), grad._version) for param, grad in self._with_gradients()}

    def after_backward(self) -> None:
        """Notes the gradients that the backward has created or added to: they carry the scale."""
        before, self._before = self._before, None
        scaled = {
            id(param): (ref(param), ref(grad), param._version)
            for param, grad in self._with_gradients()
            if before is not None and before.get(id(param)) != (id(grad), grad._version)
        }
        kept = {id(param): (ref(param), ref(grad), param._version) for param, grad in self._marked()}
        self._scaled = kept | scaled

    def _with_gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        for param in self._alive():
            if param.grad is not None:
                yield param, param.grad

    def _alive(self) -> Iterator[Tensor]:
        references: Iterable[ref[Any]] = chain(self._params.values(), self._leaves.values())
        yield from (param for param in [each() for each in references] if param is not None)

    def _marked(self) -> Iterator[tuple[Tensor, Tensor]]:
        for param_ref, grad_ref, _ in self._scaled.values():
            param, grad = param_ref(), grad_ref()
            if param is not None and grad is not None and param.grad is grad:
                yield param, grad

    def trains(self) -> bool:
        """Whether any of them gets gradients."""
        return any(param.requires_grad for param in self._alive())

    def any_scaled(self) -> bool:
        """Whether any gradients are known to carry the scale."""
        return next(self._marked(), None) is not None

    def gradients(self) -> list[Tensor]:
        """Returns the gradients of parameters that are known to carry the scale.

        Not those of other tensors, such as inputs: the user may have read them, and is not to find them changed.
        """
        return [grad for param, grad in self._marked() if isinstance(param, nn.Parameter)]

    def carrying(self, params: Iterable[nn.Parameter]) -> nn.Parameter | None:
        """Returns the first of `params`, which no known optimizer holds, whose gradient carries the scale."""
        new = []  # to the models since `find`: nothing says that their gradients are unscaled
        for param in params:
            key, grad = id(param), param.grad
            if grad is None:
                continue
            marked = self._scaled.get(key)
            if marked is not None and marked[1]() is grad:
                return param
            if not _is(self._params.get(key), param) and not _is(self._leaves.get(key), param):
                new.append(param)
            elif self._before is not None and self._before.get(key) != (id(grad), grad._version):
                return param
        return self.in_run(new) if new else None

    def left(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Returns parameters that were updated since the last backward, and those that still have scaled gradients.

        Other tensors are left out: of an input the sign of its gradient may be all that is used.
        """
        alive = [(param_ref(), version) for param_ref, _, version in self._scaled.values()]
        updated = [param for param, version in alive if isinstance(param, nn.Parameter) and param._version != version]
        return updated, [param for param, _ in self._marked() if isinstance(param, nn.Parameter)]


def _is(reference: ref[Any] | None, tensor: Tensor) -> bool:
    return reference is not None and reference() is tensor


def _leaves_of(loss: Tensor) -> Iterator[Tensor]:
    """Yields the tensors at which the graph of `loss` ends: those whose gradients a backward adds to."""
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable  # type: ignore[attr-defined]
        stack += [each for each, _ in node.next_functions]


def stepping() -> Iterator[Optimizer]:
    """Yields the optimizers in whose `step` this runs, in a closure for example; the innermost first."""
    frame = sys._getframe(1)
    code = Optimizer.profile_hook_step(lambda self: None).__code__  # torch's private name for what wraps each step
    while frame is not None:
        if frame.f_code is code and isinstance(frame.f_locals.get("self"), Optimizer):
            yield frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]


def wraps(outer: Optimizer, inner: Optimizer) -> bool:
    """Whether `outer` has `inner` in an attribute, as lookahead and SAM have the optimizer that steps for them."""
    return any(value is inner for value in vars(outer).values())
