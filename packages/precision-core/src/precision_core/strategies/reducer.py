"""Reducer: torch's DDP of one model, made anew where other parameters train than it was made for.

DDP averages the gradients of parameters that train when it is made. One that begins to train later (unfrozen, or of a
layer that was added or replaced) would get each rank's own gradient, and the ranks would drift apart; one that is
frozen later would leave its whole bucket without an average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from precision_core.policy.messages import listed

if TYPE_CHECKING:
    from precision_core.checkpoint.presence import Presence

_requires_grad = attrgetter("requires_grad")


class Reducer:
    """Has the gradients of `module` averaged by the engine that `make(init_sync=...)` returns.

    Args:
        module: the model of the user.
        make: makes the engine for what trains now; with `init_sync` all ranks get rank zero's values.
        find_unused: whether the engine goes without gradients of some of its parameters (find_unused_parameters).
        presence: what says that another rank has gone on without making its engine anew.
    """

    def __init__(
        self,
        module: nn.Module,
        make: Callable[..., DistributedDataParallel],
        *,
        find_unused: bool,
        presence: Presence | None,
    ) -> None:
        self._module = module
        self._make = make
        self._find_unused = find_unused
        self._presence = presence
        self._syncs = True
        self._engine: DistributedDataParallel | None = None
        self._previous: DistributedDataParallel | None = None  # a graph of the forward before this may lead to it
        self._reduced: dict[int, nn.Parameter] = {}  # by id, those of the engine
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensors that are alike on all ranks
        self._snapshot = _Snapshot(module)
        if self._snapshot.trained:
            self._begin(self._snapshot.trained)

    def engine(self) -> DistributedDataParallel | None:
        """Returns the engine for a forward that trains, of exactly what trains now; None: nothing does.

        Raises:
            RuntimeError: other ranks train other parameters.
        """
        self._previous = None
        if not self._snapshot.holds():
            self._snapshot = _Snapshot(self._module)
            trained = self._snapshot.trained
            reduced = self._reduced.keys()
            right = trained.keys() <= reduced if self._find_unused else trained.keys() == reduced
            if not right:
                self._check_agreed(trained)
                self._begin(trained)
        return self._engine if self._snapshot.trained else None

    def has(self, param: Tensor) -> bool:
        """Whether the model had the parameter at its last forward that trained."""
        return id(param) in self._snapshot.params

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context in which no gradients are averaged; as DDP's own, but for any engine that is made in it."""
        before = self._syncs
        self._sync(False)
        try:
            yield
        finally:
            self._sync(before)

    def _sync(self, syncs: bool) -> None:
        self._syncs = syncs
        if self._engine is not None:
            self._engine.require_backward_grad_sync = syncs

    def _begin(self, trained: dict[int, nn.Parameter]) -> None:
        """Makes the engine of `trained`, in the place of the one that there is."""
        first = not self._known  # the ranks have values of their own yet
        if self._engine is not None:  # its hooks would go on averaging
            self._engine.reducer._remove_autograd_hooks()
            for hook in self._engine._accum_grad_hooks:
                hook.remove()
        if not first:
            self._send_new()
        wanted = dict(trained)
        if self._find_unused:  # what is frozen and trained by turns needs no other engine each time
            wanted |= {key: param for key, param in self._reduced.items() if key in self._snapshot.params}
        frozen = [param for param in wanted.values() if not param.requires_grad]
        self._previous, self._engine, self._reduced = self._engine, None, wanted
        if not wanted:
            return
        try:
            for param in frozen:
                param.requires_grad_(True)
            self._engine = self._make(init_sync=first)
        finally:
            for param in frozen:
                param.requires_grad_(False)
        self._engine.require_backward_grad_sync = self._syncs
        for tensor in self._tensors():
            self._known[tensor] = True

    def _tensors(self) -> Iterator[Tensor]:
        yield from self._module.parameters()
        yield from self._module.buffers()

    def _send_new(self) -> None:
        """Gives all ranks rank zero's values of what the module did not have when the last engine was made."""
        with torch.no_grad():
            for tensor in self._tensors():
                if tensor not in self._known:
                    sent = tensor.detach().contiguous()
                    dist.broadcast(sent, src=0)
                    tensor.copy_(sent)

    def _check_agreed(self, trained: dict[int, nn.Parameter]) -> None:
        """Raises `RuntimeError` where ranks do not all train the same parameters from this forward on."""
        by_name, before = dict(self._module.named_parameters()), self._reduced.keys()
        names = [name for name, param in by_name.items() if id(param) in trained]
        changed = {name for name, param in by_name.items() if (id(param) in trained) != (id(param) in before)}
        kind = type(self._module).__name__
        what = f"{listed(sorted(changed))} of this {kind}" if changed else "layers that were replaced"
        if self._presence is not None:
            try:
                self._presence.all_call("a forward of a model in which other parameters train")
            except self._presence.error as error:
                raise RuntimeError(
                    f"{what}: requires_grad changed on rank {dist.get_rank()} after fabric.setup, and not on another "
                    "rank, which has gone on. Each rank would step gradients of its own: freeze, unfreeze and add "
                    "parameters on all ranks, before the same forward [ranks-differ]"
                ) from error
        all_names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(all_names, names)
        for rank, others in enumerate(all_names):
            if others != names:
                differ = set(others).symmetric_difference(names)
                raise RuntimeError(
                    f"rank {dist.get_rank()} and rank {rank} train other parameters of this "
                    f"{type(self._module).__name__}: {listed(sorted(differ))}. Freeze, unfreeze and add parameters on "
                    "all ranks alike, before the same forward [ranks-differ]"
                )


class _Snapshot:
    """Which parameters a module has and which of them train, compared without a walk through the module."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._views = [view.values() for each in modules for view in (each._parameters, each._modules)]
        self._all = list(chain.from_iterable(self._views))  # alive, so that no other object gets their ids
        self._ids = list(map(id, self._all))
        self._listed = list(module.parameters())
        self._flags = list(map(_requires_grad, self._listed))
        self.params = {id(param) for param in self._listed}
        self.trained = {id(param): param for param in self._listed if param.requires_grad}

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        return (
            list(map(_requires_grad, self._listed)) == self._flags
            and list(map(id, chain.from_iterable(self._views))) == self._ids
        )
