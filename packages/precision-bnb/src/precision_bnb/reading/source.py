"""The source of a function: its syntax tree, from its file, and what else that file tells."""

from __future__ import annotations

import ast
import functools
import linecache
import re
import types
from typing import Any, NamedTuple

NO_ENTRY = re.compile(
    "_|init|reset|tie|merge|unmerge|save|load|export|from_|to_?$|get_|set_|add_|configure|state_dict|extra_repr|resize|"
    "prune|quant|dequant|print|apply|train$|eval$|half|float|cuda|cpu"
)
"""Methods of the root that are not called between setup and step."""


class _File(NamedTuple):
    functions: dict[tuple[int, str], Any]
    changing: frozenset[str]


@functools.lru_cache(maxsize=256)
def _parsed(filename: str) -> _File:
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return _File({}, frozenset())
    functions, changing = {}, set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        functions[min([node.lineno, *(each.lineno for each in node.decorator_list)]), node.name] = node
        if node.name != "__init__" and (node.name == "forward" or not NO_ENTRY.match(node.name.lstrip("_"))):
            changing |= {
                each.attr
                for each in ast.walk(node)
                if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
            }
    return _File(functions, frozenset(changing))


def definition(code: types.CodeType) -> Any:
    """Returns the syntax tree of a function; None where its file is not there, as for `python -c`."""
    return _parsed(code.co_filename).functions.get((code.co_firstlineno, code.co_name))


def changing(filename: str) -> frozenset[str]:
    """Returns the attributes that functions of a file set after a model was made: they decide no branch."""
    return _parsed(filename).changing
