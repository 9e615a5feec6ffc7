"""Selection: which modules of a model a user means, by class, by name, or by a predicate; else the repeated block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import nn

from precision_core.policy import check_pattern, matches, nearest

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
One: TypeAlias = type[nn.Module] | str | Predicate
Selection: TypeAlias = One | Iterable[One]
"""Classes, names, predicates of (name, module), or several of them.

A name is that of a class ("Block"), or a pattern of dotted names ("blocks.*"), of which the outermost that match count.
"""


def check_selection(option: str, given: Any) -> tuple[One, ...]:
    """Returns what was given to `option` as a tuple; raises `ValueError` for an invalid one."""
    several = given if isinstance(given, (list, tuple, set, frozenset)) else (given,)
    for one in several:
        if isinstance(one, str):
            check_pattern(one)
        elif not (issubclass(one, nn.Module) if isinstance(one, type) else callable(one)) or isinstance(one, nn.Module):
            raise ValueError(
                f"FSDPStrategy({option}={one!r}): expected classes of modules, names of classes or modules, or a "
                "predicate of (name, module)"
            )
    return tuple(several)


def select(option: str, selection: tuple[One, ...], root: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules inside `root` that are meant, by name, in the order of definition.

    Raises:
        ValueError: a part of the selection matches nothing, or a container that has no forward of its own.
    """
    modules = {name: module for name, module in root.named_modules() if name}
    found: set[str] = set()
    for one in selection:
        names = {name for name, module in modules.items() if _is_meant(one, name, module)}
        if isinstance(one, str):
            names = {name for name in names if not any(name.startswith(f"{other}.") for other in names)}
        if not names:
            hint = nearest(one, {type(each).__name__ for each in modules.values()}) if isinstance(one, str) else ""
            raise ValueError(f"FSDPStrategy({option}={one!r}) matches no module of this {type(root).__name__}{hint}")
        found |= names
    for name in found:
        if type(modules[name]).forward is nn.Module.forward:
            kind = type(modules[name]).__name__
            raise ValueError(
                f"FSDPStrategy({option}=...): {name} is a {kind}, which has no forward; name what is in it"
            )
    return {name: module for name, module in modules.items() if name in found}


def repeated_blocks(root: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules whose class is that of the members of the longest `nn.ModuleList`s, by name.

    Lists inside of a list's members, such as the experts of a layer, are not asked. None: there is no list of two.
    """
    lists = [(name, module) for name, module in root.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [each for name, each in lists if not any(name.startswith(f"{other}.") for other, _ in lists if other)]
    longest = max((len(each) for each in outer), default=0)
    if longest < 2:
        return {}
    classes = Counter(type(block) for each in outer if len(each) == longest for block in each)
    blocks = tuple(kind for kind in classes if kind.forward is not nn.Module.forward)
    return {name: module for name, module in root.named_modules() if name and type(module) in blocks}


def _is_meant(one: One, name: str, module: nn.Module) -> bool:
    if isinstance(one, str):
        return one == type(module).__name__ or matches(one, name)
    if isinstance(one, type):
        return isinstance(module, one)
    return bool(one(name, module))
