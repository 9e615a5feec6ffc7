"""What a block was given: containers and objects are new, tensors, modules and what has no copies are shared."""

from __future__ import annotations

import threading
from collections import OrderedDict
from enum import Enum
from typing import Any

import torch
from torch import nn

from precision_fsdp.block_arguments import unchanged


class Kind(Enum):
    ONE = 1


class Box:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def test_only_what_can_be_changed_is_copied() -> None:
    tensor, module, lock = torch.ones(2), nn.Linear(1, 1), threading.Lock()
    box = Box(layers=[Box(keys=tensor, length=3)], module=module, kind=Kind.ONE, lock=lock, itself=None)
    box.itself = box
    given = ((tensor, None, 0.5, box), {"cache": box, "mask": OrderedDict(a=[tensor]), "bag": {1, 2}})
    (first, none, number, copied), named = unchanged(given)
    assert first is tensor and none is None and number == 0.5 and type(named["mask"]) is OrderedDict
    assert copied is not box and copied is named["cache"] is copied.itself
    assert copied.layers[0] is not box.layers[0] and copied.layers[0].keys is tensor
    assert copied.module is module and copied.lock is lock and copied.kind is Kind.ONE
    box.layers[0].length = 9
    box.layers.append(1)
    given[1]["mask"]["a"].append(tensor)  # type: ignore[index]
    given[1]["bag"].add(3)  # type: ignore[union-attr]
    assert copied.layers[0].length == 3 and len(copied.layers) == len(named["mask"]["a"]) == 1
    assert named["bag"] == {1, 2}
