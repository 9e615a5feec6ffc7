"""Left out: the warnings of `fabric.load(strict=False)` about missing and unexpected keys.

One text per object, before anything is written. Where warnings are errors, the load is undone as after any other error.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from precision_core.checkpoint.live.state import is_stateful, named_tensors, plain_name, state_of
from precision_core.checkpoint.tree import KeyPath

_SHOWN = 10


def absent(tree: dict[str, Any], content: dict[str, Any]) -> Iterator[str]:
    """Yields a text for each object in `tree` that `content` has nothing for, and one for all such plain values."""
    values: list[str] = []
    yield from _absent(tree, content, (), values)
    if values:
        yield f"not in the checkpoint, kept as they are: {_listed(values)}"


def _absent(tree: dict[str, Any], content: Any, path: KeyPath, values: list[str]) -> Iterator[str]:
    for key, value in tree.items():
        key_path = (*path, key)
        name = ".".join(map(str, key_path))
        found = isinstance(content, dict) and key in content
        if type(value) is dict:
            yield from _absent(value, content[key] if found else {}, key_path, values)
        elif not found and is_stateful(value):
            others = sorted(map(str, content))[:_SHOWN] if isinstance(content, dict) else []
            yield f"{_nothing(name, value)}: it has no {str(key)!r}, but {others}"
        elif not found:
            values.append(name)


def of_module(key_path: KeyPath, module: nn.Module, saved: dict[str, Any], result: Any = None) -> str:
    """Returns the text for a module, or an empty string; `result` is what its `load_state_dict` returned."""
    if result is None:
        live = state_of(module)
        missing, unexpected = [key for key in live if key not in saved], [key for key in saved if key not in live]
    else:
        missing, unexpected = (list(map(plain_name, keys)) for keys in (result.missing_keys, result.unexpected_keys))
    missing = less_tied(missing, {plain_name(name): tensor for name, tensor in named_tensors(module).items()})
    if not missing and not unexpected:
        return ""
    name = ".".join(map(str, key_path))
    in_part = len(saved) > len(unexpected)
    head = f"the checkpoint matches {name} ({type(module).__name__}) in part" if in_part else _nothing(name, module)
    lists = (("missing", missing), ("unexpected", unexpected))
    return "; ".join([head, *(f"{word} in the checkpoint: {_listed(names)}" for word, names in lists if names)])


def warn(path: Path, text: str) -> None:
    """Warns of a load from `path`, at the line outside of precision_core that called it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "precision_core":
        level, frame = level + 1, frame.f_back
    warnings.warn(f"fabric.load({str(path)!r}, strict=False): {text}", UserWarning, stacklevel=level)


def _nothing(name: str, live: Any) -> str:
    return f"nothing in the checkpoint matches {name} ({type(live).__name__}), which stays as it is"


def less_tied(missing: Iterable[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the missing names, less those whose tensor is loaded under another name."""
    missing = list(missing)
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in missing}
    return [name for name in missing if name not in tensors or id(tensors[name]) not in loaded]


def _listed(names: Iterable[str]) -> str:
    names = list(map(str, names))
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
