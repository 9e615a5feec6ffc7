"""The text: 450,000 characters of real English that every Python ships.

`pydoc_data.topics` is the language reference as plain text, what `help("assignment")` prints. It needs no download,
and is prose rather than toy data: who knows the frequencies of its byte pairs and nothing else stays at 2.46 nats per
byte (Python 3.11). The wording differs a little between Python versions, and so do losses; the length does not (Python
3.10 to 3.13 ship 459,000 to 511,000 characters of it).
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor

CHARACTERS = 450_000
HELD_OUT = 0.1
"""The share of the bytes, at the end, that training never sees."""


def read_text() -> str:
    """Returns the first `CHARACTERS` characters of all topics, joined in alphabetical order."""
    text = "".join(topics[name] for name in sorted(topics))
    if len(text) < CHARACTERS:
        raise RuntimeError(f"this Python's pydoc_data.topics has {len(text)} characters, fewer than {CHARACTERS}")
    return text[:CHARACTERS]


def split_text() -> tuple[Tensor, Tensor]:
    """Returns (training, held out): the bytes of the text as integers, the last tenth apart."""
    data = torch.frombuffer(bytearray(read_text(), "utf-8"), dtype=torch.uint8).long()
    start = round(len(data) * (1 - HELD_OUT))
    return data[:start], data[start:]
