"""The ledger: which dtype each part of training was observed in, in all and per module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from precision_lab.auditing.kinds import NORM, PRODUCTS, SOFTMAX
from precision_lab.auditing.record import BACKWARD, FORWARD, LOOP, Record

PARTS = (
    "params", "frozen params", "buffers", "products, forward", "products, backward", "norms", "softmax",
    "saved activations", "gradients", "reductions over ranks", "master weights", "optimizer state", "loss", "outputs",
)  # fmt: skip


def short(dtype: torch.dtype) -> str:
    """Returns the dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


@dataclass
class Ledger:
    """Part -> dtype -> bytes: kept between steps, or made in two steps for products and reductions."""

    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    modules: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)  # module -> part -> dtype -> bytes
    states: dict[str, dict[str, int]] = field(default_factory=dict)  # key of a state -> dtype -> bytes

    def dtypes(self, part: str) -> list[str]:
        """The dtypes of a part, most bytes first."""
        return sorted(self.parts.get(part, {}), key=lambda name: -self.parts[part][name])

    def add(self, part: str, module: str, dtype: torch.dtype, size: int) -> None:
        """Counts bytes of a part, in a module and in all."""
        name = short(dtype)
        for table in (self.parts, self.modules.setdefault(module, {})):
            row = table.setdefault(part, {})
            row[name] = row.get(name, 0) + size


_STORED = {
    "params": "params", "frozen": "frozen params", "buffers": "buffers", "grads": "gradients",
    "master": "master weights", "state": "optimizer state",
}  # fmt: skip


def ledger_of(record: Record) -> Ledger:
    """Returns the ledger of what was seen."""
    ledger = Ledger()
    for each in record.stored:
        module = each.name.rpartition(".")[0]
        ledger.add(_STORED[each.kind], module, each.dtype, each.bytes)
        if each.kind in ("state", "master"):
            row = ledger.states.setdefault(each.key, {})
            row[short(each.dtype)] = row.get(short(each.dtype), 0) + each.bytes
    for op in record.ops:
        part = ""
        if op.kind in PRODUCTS and op.phase in (FORWARD, BACKWARD, LOOP):
            part = "products, backward" if op.phase == BACKWARD else "products, forward"
        elif op.kind == NORM and op.phase == FORWARD:
            part = "norms"
        elif op.kind == SOFTMAX and op.phase in (FORWARD, LOOP):
            part = "softmax"
        if part and op.inputs:
            # What a product computes in is what its operands are: a bias may be wider.
            ledger.add(part, op.module, op.inputs[-1 if part.startswith("products") else 0], op.bytes)
    for saved in record.saved:
        ledger.add("saved activations", saved.module, saved.dtype, saved.bytes)
    for event in record.of("reduce"):
        if event.phase != LOOP or event.dtype.is_floating_point:
            ledger.add("reductions over ranks", "", event.dtype, event.elements * event.dtype.itemsize)
    counted = Counter(event.dtype for event in record.of("backward"))
    for dtype, count in counted.items():
        ledger.add("loss", "", dtype, count * dtype.itemsize)
    for event in record.of("forward"):
        if event.grad and event.params:  # a pretrained model may be in eval mode while it is trained
            for dtype in event.outputs:
                if dtype.is_floating_point:
                    ledger.add("outputs", event.root, dtype, dtype.itemsize)
    return ledger
