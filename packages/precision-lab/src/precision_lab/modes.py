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


def default_modes() -> list[Policy]:
    """Returns core's six modes."""
    return list(MODES.values())


def parse_modes(text: str) -> list[Policy]:
    """Returns the policies that `text` lists.

    Raises:
        ValueError: a mode that `Policy.parse` does not know, with its text; the same one twice.
    """
    policies: list[Policy] = []
    for mode in split_modes(text):
        policy = Policy.parse(mode)
        if policy in policies:
            raise ValueError(f"{mode!r} is given twice: it means {policy}")
        policies.append(policy)
    return policies


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
