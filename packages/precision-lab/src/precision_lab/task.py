"""A task: what is trained, as the user's own code makes it.

    def make():
        model = ...
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return precision_lab.Task(model, optimizer, batches=lambda seed: ..., loss=lambda model, batch: ...)

`make` is called once in each process, after seeding, and builds in float32 on the CPU: casting and moving is what is
compared. `understood` also takes what people have lying around: a plain tuple in the same order, a transformers model,
which computes its own loss, and a module with a `DataLoader` and a criterion.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from precision_core.policy import map_tensors

HELD_OUT_SEED = 2**31 - 1
"""`batches` of this seed are evaluated on, where the task has no `evaluate`; it is no seed to train with."""
HELD_OUT_BATCHES = 16

Batches = Callable[[int], Iterable[Any]]


@dataclass
class Task:
    """A model, its optimizer, batches and a loss.

    Args:
        batches: seed -> an iterable of batches, maybe endless; one that ends is started again. A `DataLoader` is taken
            as it is, and shuffles by the seed.
        loss: (model, batch) -> a tensor of one value. A criterion such as `nn.CrossEntropyLoss()` is called with the
            model's output and the second of a batch of two. None: the model's output has a `.loss`, as transformers'.
        evaluate: model -> a number, lower is better, without gradients and in eval mode. None: the mean loss over 16
            batches of a seed that is not trained on.
        clip_norm: the norm that gradients are clipped to; None: they are not.
        schedule: (step, steps) -> a factor on the optimizer's learning rates; steps count from 0.
    """

    model: nn.Module
    optimizer: Optimizer
    batches: Any
    loss: Callable[..., Any] | None = None
    evaluate: Callable[[nn.Module], Any] | None = None
    _: KW_ONLY
    clip_norm: float | None = None
    schedule: Callable[[int, int], float] | None = None

    def __post_init__(self) -> None:
        for name, expected in (("model", nn.Module), ("optimizer", Optimizer)):
            if not isinstance(getattr(self, name), expected):
                given = type(getattr(self, name)).__name__
                raise TypeError(f"Task({name}=...): expected a torch {expected.__name__}, got a {given}")
        for name in ("loss", "evaluate", "schedule"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"Task({name}=...): expected a function, got a {type(getattr(self, name)).__name__}")
        self.batches = _batches(self.batches)
        self.loss = _loss(self.loss)

    def stream(self, seed: int) -> Iterator[Any]:
        """Yields batches of `seed` for ever.

        Raises:
            ValueError: there is none.
        """
        while True:
            empty = True
            for batch in self.batches(seed):
                empty = False
                yield batch
            if empty:
                raise ValueError(f"batches({seed}) has no batch")

    def compute_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Returns the loss, a tensor of one value.

        Raises:
            TypeError: `loss` returned something else.
        """
        assert self.loss is not None
        loss = self.loss(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                f"loss(model, batch) returned {_what(loss)}: expected a tensor of one value, such as a mean"
            )
        return loss

    def held_out(self, model: nn.Module, moved: Callable[[Any], Any] = lambda batch: batch) -> float:
        """Returns what `evaluate` says of the model in eval mode, without gradients; `moved` takes batches to it."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if self.evaluate is not None:
                    return _number(self.evaluate(model))
                batches = itertools.islice(self.batches(HELD_OUT_SEED), HELD_OUT_BATCHES)
                losses = [self.compute_loss(model, moved(batch)).item() for batch in batches]
                return sum(losses) / len(losses)
        finally:
            model.train(was_training)


def understood(made: Any) -> Task:
    """Returns the task for what `make` returned: a `Task`, or a tuple of its first fields.

    Raises:
        TypeError: it is neither; says what is expected.
    """
    if isinstance(made, Task):
        return made
    if isinstance(made, (tuple, list)) and 3 <= len(made) <= 5:
        return Task(*made)
    what = f"{len(made)} values" if isinstance(made, (tuple, list)) else _what(made)
    raise TypeError(
        f"make() returned {what}: expected precision_lab.Task(model, optimizer, batches, loss, evaluate), or a tuple "
        "of these; transformers models need no loss"
    )


def _number(value: Any) -> float:
    """Returns what `evaluate` returned as a float; raises `TypeError` where it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"evaluate(model) returned {_what(value)}: expected one number, lower is better, such as a mean loss"
        ) from None


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"an object of type {type(value).__name__}"


def share(batch: Any, rank: int, ranks: int) -> Any:
    """Returns a rank's share of a batch: every tensor in it, cut along its first dimension.

    Raises:
        ValueError: a tensor that cannot be cut in so many.
    """
    if ranks == 1:
        return batch

    def cut(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or len(tensor) % ranks:
            raise ValueError(f"{ranks} processes cannot share a batch with a tensor of shape {tuple(tensor.shape)}")
        return tensor.chunk(ranks)[rank]

    return map_tensors(batch, cut)


def _batches(given: Any) -> Batches:
    if isinstance(given, DataLoader):
        return lambda seed: _epochs(given, seed)
    if isinstance(given, Iterator):
        raise TypeError(
            "Task(batches=...): an iterator can be run through once only: pass a function of the seed, "
            "lambda seed: ..., that returns a new one"
        )
    if callable(given):
        return given
    if isinstance(given, Iterable):
        return lambda seed: given
    raise TypeError(
        "Task(batches=...): expected a function of the seed, lambda seed: ..., that returns an iterable of batches; "
        f"or a DataLoader; got a {type(given).__name__}"
    )


def _epochs(loader: DataLoader[Any], seed: int) -> Iterator[Any]:
    """Yields the loader's batches, epoch after epoch, shuffled by the seed."""
    end = object()
    for epoch in itertools.count():
        # A loader without a generator of its own draws from torch's, when it starts and with its first batch.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + epoch)
            if loader.generator is not None:
                loader.generator.manual_seed(seed + epoch)
            rest = iter(loader)
            first = next(rest, end)
        if first is end:
            return
        yield first
        yield from rest


def _loss(given: Any) -> Callable[..., Any]:
    if given is None:
        return own_loss
    if isinstance(given, nn.Module) or getattr(given, "__module__", "") == "torch.nn.functional":
        return lambda model, batch: _criterion(given, model, batch)
    return given


def own_loss(model: nn.Module, batch: Any) -> Any:
    """Returns the `.loss` of the model's output; a mapping becomes its keywords, a tuple its arguments."""
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise TypeError(
            f"{type(model).__name__} returned no loss: give it labels in the batch, or the task a loss, "
            "Task(..., loss=lambda model, batch: ...)"
        )
    return loss


def _criterion(criterion: Any, model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"a criterion needs batches of two, inputs and targets, and this one is a {type(batch).__name__}: "
            "pass loss=lambda model, batch: ..."
        )
    inputs, targets = batch
    return criterion(model(inputs), targets)
