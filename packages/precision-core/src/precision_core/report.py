"""Report: what a conversion did to the model, as one frozen value that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

_ROWS = 20


class Item(NamedTuple):
    """One line of a report: a module's, parameter's or buffer's dotted name and what was done or why not."""

    name: str
    detail: str


@dataclass(frozen=True)
class Report:
    """What `convert_module` did, printable as a table; sizes are bytes of parameters and buffers, shared ones once."""

    mode: str
    converted: tuple[Item, ...] = ()
    skipped: tuple[Item, ...] = ()
    notes: tuple[str, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        size = f"{_mib(self.bytes_before)} -> {_mib(self.bytes_after)}"
        lines = [f"{self.mode}: {len(self.converted)} converted, {len(self.skipped)} skipped, {size}"]
        for title, items in (("converted", self.converted), ("skipped", self.skipped)):
            width = max((len(item.name) for item in items[:_ROWS]), default=0)
            lines += [f"  {title:9}  {item.name:{width}}  {item.detail}" for item in items[:_ROWS]]
            if len(items) > _ROWS:
                lines.append(f"  {title:9}  ... and {len(items) - _ROWS} more")
        return "\n".join(lines + [f"  note       {note}" for note in self.notes])


def module_bytes(module: nn.Module) -> int:
    """Returns the bytes of all parameters and buffers, shared ones counted once, lazy ones not yet."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not is_lazy(tensor))


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
