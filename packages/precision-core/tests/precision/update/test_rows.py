"""Rows: memory that batches share, whose size is a share of what is stepped."""

from __future__ import annotations

import pytest
import torch

from precision_core.precision.update.rows import LARGEST, Rows, copy_all, row_of, row_size

CPU = torch.device("cpu")


@pytest.mark.parametrize(("total", "count", "size"), [(2**27, 2, LARGEST), (2**20, 2, 26_176), (2**20, 6, 8704)])
def test_rows_take_a_fifth_of_a_byte_for_each_element_beside_an_optimizer_that_allocates(
    total: int, count: int, size: int
) -> None:
    assert row_size(total, count, 64, allocates=True) == size and size % 64 == 0
    assert size * count * 4 <= 0.2 * total


@pytest.mark.parametrize(("total", "count", "size"), [(0, 2, 2**14), (2**17, 2, 2**14), (2**17, 5, 6528)])
def test_rows_of_small_models_take_128_kilobytes(total: int, count: int, size: int) -> None:
    assert row_size(total, count, 64, allocates=True) == row_size(total, count, 64, allocates=False) == size
    assert size * count * 4 <= 2**17


def test_rows_take_twice_as_much_beside_a_fused_optimizer() -> None:
    assert row_size(2**20, 2, 64, allocates=False) == 52_416
    assert row_size(2**27, 2, 64, allocates=False) == LARGEST


def test_the_parts_of_a_row_lie_beside_each_other_and_the_next_batch_has_the_same_memory() -> None:
    rows, shapes = Rows(2, 100), [torch.Size([3, 4]), torch.Size([]), torch.Size([5])]
    first, second = rows.cut(shapes, CPU)
    assert [part.shape for part in first.parts] == shapes
    first.flat.copy_(torch.arange(18.0))
    assert torch.cat([part.flatten() for part in first.parts]).tolist() == list(range(18))
    second.flat.zero_()
    assert rows.cut(list(shapes), CPU)[0] is first
    (other, _) = rows.cut([torch.Size([2])], CPU)
    assert other.flat.tolist() == [0, 1] and first.flat[17] == 17  # the rows do not overlap


def test_halves_lie_in_the_first_half() -> None:
    row = Rows(1, 100).cut([torch.Size([3, 3]), torch.Size([2])], CPU)[0]
    row.halves.flat.copy_(torch.arange(11.0))
    assert [half.tolist() for half in row.halves.parts] == [[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [9, 10]]
    assert row.halves.flat.data_ptr() == row.flat.data_ptr() and row.words[0].dtype is torch.int32


def test_copies_cast_and_count_as_writes() -> None:
    outs, sources = [torch.zeros(2), torch.zeros((), dtype=torch.int16)], [torch.ones(2).bfloat16(), torch.tensor(7)]
    copy_all(outs, sources)
    assert outs[0].tolist() == [1, 1] and outs[1] == 7 and [out._version for out in outs] == [1, 1]
    assert row_of(outs[0]).parts == [outs[0]]
