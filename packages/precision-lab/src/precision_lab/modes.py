"""--modes: a comma separated list of precisions.

A spelled-out policy has commas of its own: "32-true,params=float32,compute=bfloat16,64-true" are three modes. A comma
belongs to the policy when a field (`key=`) stands on both sides of it and the policy does not have that field yet:

    a=1,b=2        one policy
    a=1,b=2,a=3    two: a policy has each field once
    a=1,x          two: x is no field
"""

from __future__ import annotations

import re

from precision_core import MODES, Policy
from precision_core.support import PLUGINS, base_of, find, is_core_mode, load_plugin, names
from precision_lab.variants import ROWS, spelled, split_variants


def default_modes() -> list[str]:
    """Returns core's modes."""
    return list(MODES)


def modes_to_run(text: str | None) -> list[str]:
    """Returns core's modes for None, and those of installed packages as well for "all"; else those that are listed.

    Raises:
        ValueError: as `parse_modes`.
    """
    if text == "all":
        return [*MODES, *names(PLUGINS)]
    return default_modes() if text is None else parse_modes(text)


def modes_to_compare(text: str | None) -> list[str]:
    """Returns what `modes_to_run` does, where "all" has variants as well (`variants.ROWS`), and a list may name some.

    Raises:
        ValueError: as `parse_modes`.
    """
    if text is None or text != "all":
        return default_modes() if text is None else parse_modes(text, variants=True)
    modes = modes_to_run(text)
    return [*modes, *(row for row in ROWS if split_variants(row)[0] in modes)]


def parse_modes(text: str, *, variants: bool = False) -> list[str]:
    """Returns the modes that `text` lists: core's in the policy's spelling, those of packages by registered names.

    Args:
        variants: whether a mode may have some, as in "nf4+lora".

    Raises:
        ValueError: an unknown mode or variant, or one whose package is not installed, with core's message; a mode given
            twice.
    """
    modes: list[str] = []
    for given in split_modes(text):
        mode, changes = split_variants(given) if "+" in given else (given, ())
        if changes and not variants:
            raise ValueError(
                f"{given!r} changes the task, which `precision compare` and `estimate` do alone: make the task so, "
                f"and say {mode!r}"
            )
        mode = spelled(_checked(mode), changes)
        if mode in modes:
            raise ValueError(f"{given!r} is given twice" + (f": it means {mode}" if mode != given else ""))
        modes.append(mode)
    return modes


def _checked(mode: str) -> str:
    if is_core_mode(mode):
        return str(Policy.parse(mode))
    if find(PLUGINS, base_of(mode)) is None:
        load_plugin(mode)  # raises before it loads anything
    return mode


def split_modes(text: str) -> list[str]:
    """Returns the modes in `text`, each as it was written."""
    modes: list[str] = []
    fields: set[str] = set()  # that the policy has so far, or its exception when it has come to one
    for piece in text.split(","):
        if fields and "=" in piece and _key(piece).isidentifier() and _key(piece) not in fields:
            modes[-1] += "," + piece
        else:
            modes.append(piece)
            fields = set()
        if ";" in piece:
            fields = set()
        last = re.split("[;:]", piece)[-1]  # "compute=bfloat16; head: params=float32" ends in a field of the exception
        fields = {*fields, _key(last)} if "=" in last else set()
    return [mode.strip() for mode in modes]


def _key(piece: str) -> str:
    return piece.partition("=")[0].strip()
