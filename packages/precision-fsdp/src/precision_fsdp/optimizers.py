"""Optimizers: checks, before a model is converted, that they can step shards, and hold parameters of one kind."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, Optimizer, Rprop, SparseAdam

from precision_core.policy import listed

_NOT_FOR_SHARDS: dict[tuple[type[Optimizer], bool], str] = {
    (SGD, True): "torch has no fused SGD for shards; pass fused=False",
    (Adagrad, True): "torch has no fused Adagrad for shards; pass fused=False",
    (Adafactor, False): "its row and column statistics need full parameters; use AdamW",
    (LBFGS, False): "it works on all parameters as one vector, which no process has; use AdamW",
    (Rprop, False): "it assigns by index, which torch does not do for shards; use AdamW",
    (SparseAdam, False): "it steps sparse gradients, which FSDP does not reduce; use AdamW",
}
"""(class, only when fused) -> why torch's optimizer cannot step sharded parameters."""


def check_optimizer(optimizer: Optimizer) -> None:
    """Raises `ValueError` for an optimizer that cannot step shards, or that has state for unsharded parameters."""
    kind, fused = type(optimizer), any(group.get("fused") for group in optimizer.param_groups)
    for (refused, when_fused), reason in _NOT_FOR_SHARDS.items():
        if isinstance(optimizer, refused) and fused >= when_fused:
            raise ValueError(f"{kind.__name__} cannot run under FSDPStrategy: {reason} [sharded-optimizer]")
    params = [param for group in optimizer.param_groups for param in group["params"]]
    full = [param for param in params if not isinstance(param, DTensor) and optimizer.state.get(param)]
    if full:
        shapes = listed((str(tuple(param.shape)) for param in full), 5)
        why = " (Adagrad makes its state in its constructor)" if isinstance(optimizer, Adagrad) else ""
        raise ValueError(
            f"this {kind.__name__} has state for {len(full)} unsharded parameters, of shapes {shapes}{why}, and FSDP "
            "shards parameters: make the optimizer after fabric.setup(model) and give it to fabric.setup_optimizers, "
            "or set up a new one and bring its state with fabric.load [sharded-optimizer]"
        )


def check_members(optimizer: Optimizer, inside: Container[Tensor], name_of: Callable[[Tensor], str]) -> None:
    """Raises `ValueError` for one that holds parameters `inside` a model or sharded, and others beside them."""
    params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
    outside = [param for param in params if not isinstance(param, DTensor) and param not in inside]
    if outside and len(outside) < len(params):
        names = ", ".join(name_of(param) for param in outside[:5])
        raise ValueError(
            f"this {type(optimizer).__name__} holds parameters of a sharded model and others beside them, whose "
            f"gradients would differ from rank to rank: {names}. Put them into the model, or into an optimizer "
            "of their own"
        )


class Members:
    """The parameters that optimizers hold: checked again before a step when some were added."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Members], tuple[()]]:
        return Members, ()  # in a process that is started with the strategy there are no optimizers yet

    def check(self, optimizer: Optimizer, roots: Iterable[nn.Module], name_of: Callable[[Tensor], str]) -> None:
        """Raises `ValueError` for parameters that FSDP does not average, those of the sharded `roots` among them."""
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if self._counts.get(optimizer) == count:
            return
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        added = [
            name
            for root in roots
            for name, param in root.named_parameters()
            if id(param) in held and param.requires_grad and not isinstance(param, DTensor)
        ]
        if added:
            raise ValueError(
                f"this {type(optimizer).__name__} holds parameters that were added to a model after fabric.setup: "
                f"{', '.join(added[:5])}{', ...' * (len(added) > 5)}. FSDP shards and averages what the model had "
                "then, so each rank would step gradients of its own: add layers before fabric.setup"
            )
        check_members(optimizer, (), name_of)
        self._counts[optimizer] = count
