"""Report: what a conversion did to the model, as one frozen value that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from precision_core.policy.dtypes import dtype_name
from precision_core.policy.policy import Policy

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
    policy: Policy | None = None
    """What is computed in what, where the plugin says it; the report begins with it."""
    is_set_up: bool = True
    """False: no model was converted yet."""
    lead: str = ""
    """What the table says first, how much of a model was converted for example."""

    def __str__(self) -> str:
        lines = self._head()
        for title, items in (("converted", self.converted), ("skipped", self.skipped)):
            width = max((len(item.name) for item in items[:_ROWS]), default=0)
            lines += [f"  {title:9}  {item.name:{width}}  {item.detail}" for item in items[:_ROWS]]
            if len(items) > _ROWS:
                lines.append(f"  {title:9}  ... and {len(items) - _ROWS} more")
        return "\n".join(lines + [f"  note       {note}" for note in self.notes])

    def _head(self) -> list[str]:
        computes = [] if self.policy is None else [_computes(self.policy, self.mode)]
        if not self.is_set_up:
            return [f"{self.mode}: {'; '.join([*computes, 'no model is set up yet'])}"]
        lead = f"{self.lead}; " if self.lead else ""
        size = f"{_mib(self.bytes_before)} -> {_mib(self.bytes_after)}"
        counts = f"{len(self.converted)} converted, {len(self.skipped)} skipped, {size}"
        if not computes:
            return [f"{self.mode}: {lead}{counts}"]
        if not self.converted and not self.skipped and self.bytes_before == self.bytes_after:
            counts = f"no parameter or buffer had to be cast, {_mib(self.bytes_after)}"
        return [f"{self.mode}: {lead}{computes[0]}", f"  {counts}"]


def _computes(policy: Policy, mode: str) -> str:
    params, compute = dtype_name(policy.params), dtype_name(policy.compute)
    if policy.mixed:
        text = f"parameters are {params}, layers compute in {compute} under autocast"
    else:
        text = f"parameters and computation are {params}"
    if policy.exceptions:
        text += f", but in {', '.join(pattern for pattern, _ in policy.exceptions)}"
    is_base = mode.partition(";")[0].strip() == str(policy).partition(";")[0].strip()
    return text if is_base else f"around its own layers, {text}"


def module_bytes(module: nn.Module) -> int:
    """Returns the bytes of all parameters and buffers, shared ones counted once, lazy ones not yet."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.nbytes for tensor in tensors if not is_lazy(tensor))


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
