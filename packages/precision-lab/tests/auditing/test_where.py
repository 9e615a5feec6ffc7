"""The user's line is the innermost one outside of libraries."""

from __future__ import annotations

from pathlib import Path

import torch

from precision_lab.auditing.where import Line, Where


def test_through_torch_it_is_the_line_of_the_call() -> None:
    where, lines = Where(), []

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            lines.append(where.line())
            return x

    torch.nn.Sequential(Layer())(torch.ones(1))  # the inner line is this file's, too
    assert [(line.function, Path(line.file).name, line.text) for line in lines if line] == [
        ("forward", "test_where.py", "lines.append(where.line())")
    ]


def test_a_call_from_torch_only_is_told_by_its_caller() -> None:
    where, lines = Where(), []
    value = torch.ones(1, requires_grad=True)
    value.register_hook(lambda grad: None)
    torch.utils._pytree.tree_map(lambda _: lines.append(where.line(2)), [1])
    assert lines[0] is not None and lines[0].function == "test_a_call_from_torch_only_is_told_by_its_caller"


def test_lines_are_found_by_their_text() -> None:
    where = Where()
    assert where.line() is not None
    found = where.line_with("def test_lines_are_" + "found_by")
    assert found is None  # definitions are no calls
    found = where.line_with("Where" + "()")
    assert found is not None and found.file == __file__


def test_a_line_says_file_and_number() -> None:
    assert str(Line("<stdin>", 3, "f")) == "<stdin>:3"
