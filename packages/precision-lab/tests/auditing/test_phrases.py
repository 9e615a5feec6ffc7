"""Names, sizes and modules in sentences."""

from __future__ import annotations

import torch

from precision_lab.auditing.phrases import cast_line, dtypes, is_asked, listed, module_of, size
from precision_lab.auditing.record import Record


def test_names_are_listed_once_and_counted() -> None:
    assert listed(["a", "b", "a"]) == "a, b"
    assert listed("abcde") == "a, b, c and 2 more"
    assert dtypes([torch.float16, torch.bfloat16, torch.float16]) == "bfloat16 and float16"


def test_the_module_of_parameters_is_the_innermost_that_has_them() -> None:
    assert module_of(["a.b.weight", "a.bc.weight"]) == "a"
    assert module_of(["a.b.weight", "a.b.bias"]) == "a.b"
    assert module_of(["weight", "a.b.bias"]) == module_of([]) == ""


def test_sizes() -> None:
    assert [size(n) for n in (12, 2048, 3 << 20, 5 << 30)] == ["12 bytes", "2.0 KiB", "3.0 MiB", "5.00 GiB"]


def test_nobody_asked_in_an_empty_record() -> None:
    assert not is_asked(Record()) and is_asked(Record(engines=["precision"])) and cast_line(Record()) is None
