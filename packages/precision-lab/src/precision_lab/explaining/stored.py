"""What was not finite before the step: a batch, a parameter, a buffer, a gradient that the loss sent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from precision_lab.explaining.explanation import Explanation
from precision_lab.explaining.numbers import is_finite, numbers_of, tensors
from precision_lab.explaining.replay import Step


def masks_of(step: Step) -> set[str]:
    """Returns the inputs and buffers that are masks: of zeros and -inf, and nothing else that is not finite."""
    named = [*_inputs(step), *((f"buffer {name}", each) for name, each in step.model.named_buffers())]
    found: set[str] = set()
    for name, value in named:
        bad = [each for each in tensors(value) if not is_finite(each)]
        if bad and all(_is_mask(each) for each in bad):
            found.add(name)
    return found


def _is_mask(tensor: Tensor) -> bool:
    numbers = numbers_of(tensor)
    return not numbers.nans and not numbers.largest and not bool((tensor == float("inf")).any())


def _inputs(step: Step) -> list[tuple[str, Any]]:
    named = [(f"input {number}", each) for number, each in enumerate(step.args)]
    return named + [(f"input {key}", each) for key, each in step.kwargs.items()]


def explain_leaf(step: Step, leaf: str) -> Explanation:
    """Returns the explanation for what the step was given."""
    what, _, name = leaf.partition(" ")
    if what == "input":
        return _data(step, leaf)
    if what == "gradient":
        return Explanation(
            "the loss's gradient",
            f"the {leaf} that the loss sent is not finite, while the outputs are: it is in what computes the loss.",
            "loss",
            name=leaf,
        )
    if what not in ("parameter", "buffer"):
        return Explanation("not finite before", f"{leaf or 'a tensor that the model holds'} was not finite.", name=leaf)
    stored: dict[str, Tensor] = dict(
        step.model.named_parameters() if what == "parameter" else step.model.named_buffers()
    )
    bad = [each for each, tensor in stored.items() if not is_finite(tensor)]
    value = stored[name]
    beyond = numbers_of(value)
    narrow = value.dtype.itemsize < 4 and not beyond.nans
    cast = f", or it was beyond {beyond.dtype}'s range when the model was cast" if narrow else ""
    others = f" So are {len(bad) - 1} others of {len(stored)}." if bad[1:] else ""
    return Explanation(
        f"a {what} that was not finite",
        f"{name} was not finite before this forward ({numbers_of(value)}): an earlier step made it so, or what was "
        f"loaded{cast}.{others}",
        "weights",
        module=name.rpartition(".")[0],
        name=name,
        operands=[numbers_of(value)],
    )


def _data(step: Step, leaf: str) -> Explanation:
    value = dict(_inputs(step))[leaf]
    tensor = next(each for each in tensors(value) if not is_finite(each))
    rows = ""
    if tensor.dim() > 1:
        bad = (~tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        rows = f", in rows {', '.join(map(str, bad[:8]))}{', ...' if bad[8:] else ''} of {tensor.shape[0]}"
    return Explanation(
        "bad data",
        f"{leaf} of the batch is not finite: {numbers_of(tensor)}{rows}.",
        "data",
        name=leaf,
        operands=[numbers_of(tensor)],
    )
