"""Copies: `copy.deepcopy` and pickle of a sharded model raise, by methods of the instance."""

from __future__ import annotations

from typing import Any

from torch import nn


class _Refusal:
    """A method of the instance that raises; an object, since copies of the model do not share it."""

    def __init__(self, what: str, way_out: str) -> None:
        self._message = f"{what} would copy this process's shards only: {way_out}"

    def __call__(self, *_: Any) -> Any:
        raise RuntimeError(self._message)


def refuse_copies(module: nn.Module) -> None:
    """Has `copy.deepcopy(module)` and `pickle.dumps(module)` raise `RuntimeError` with the way out."""
    name = type(module).__name__.removeprefix("FSDP")  # FSDP2's subclass is named like that
    vars(module)["__deepcopy__"] = _Refusal(f"a deepcopy of this {name}", "copy the model before fabric.setup")
    vars(module)["__reduce_ex__"] = _Refusal(f"a pickle of this {name}", "save it with fabric.save")
