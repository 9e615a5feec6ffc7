"""Seeds and generator states: the streams of Python, numpy and torch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from precision_core import Fabric
from precision_core.data.rng import rng_state, seed_everything, set_rng_state
from precision_core.hardware import MODULES

CPU = torch.device("cpu")


def draw() -> list[Any]:
    normal = random.gauss(0, 1), float(np.random.randn()), torch.randn(1).item()  # each keeps half of a pair for later
    return [*normal, random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist(), torch.randperm(5).tolist()]


def test_the_streams_are_those_of_the_seed() -> None:
    assert seed_everything(7) == 7
    first = draw()
    draw()
    assert Fabric.seed_everything(7) == 7 and draw() == first
    assert seed_everything(8) == 8 and all(a != b for a, b in zip(draw(), first, strict=True))
    seed_everything(7)
    expected = random.Random(7).random(), np.random.RandomState(7).rand(), torch.Generator().manual_seed(7)
    assert (random.random(), np.random.rand()) == expected[:2]
    assert torch.equal(torch.rand(4), torch.rand(4, generator=expected[2]))


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_smallest_and_the_largest_seed_are_taken(seed: int) -> None:
    assert seed_everything(seed) == seed


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True, "1", None, np.int64(3)])
def test_other_seeds_are_an_error_and_change_nothing(seed: Any) -> None:
    seed_everything(3)
    first = draw()
    seed_everything(3)
    with pytest.raises(ValueError, match="expected an int from 0 to 4294967295"):
        seed_everything(seed)
    assert draw() == first


@pytest.mark.parametrize("drawn", [0, 1])
def test_a_restored_state_continues_the_streams_in_the_middle_of_a_pair(drawn: int) -> None:
    seed_everything(5)
    for _ in range(drawn):
        random.gauss(0, 1), np.random.randn(), torch.randn(1)
    state = rng_state(CPU)
    first = draw()
    draw()
    set_rng_state(state, CPU)
    assert draw() == first


def test_a_state_without_numpy_leaves_numpys_alone() -> None:
    state = rng_state(CPU)
    del state["numpy"]
    np.random.seed(1)
    expected = np.random.RandomState(1).rand()
    set_rng_state(state, CPU)
    assert np.random.rand() == expected


def test_the_generators_of_a_device_that_a_package_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    class Abacus:
        state = 0

        @classmethod
        def manual_seed_all(cls, seed: int) -> None:
            cls.state = seed

        @classmethod
        def get_rng_state(cls, device: torch.device) -> int:
            return cls.state

        @classmethod
        def set_rng_state(cls, state: int, device: torch.device) -> None:
            cls.state = state

    monkeypatch.setitem(MODULES, "xla", Abacus)
    seed_everything(9)
    state = rng_state(torch.device("xla", 0))
    assert Abacus.state == state["xla"] == 9
    seed_everything(10)
    set_rng_state(state, CPU)
    assert Abacus.state == 10
    set_rng_state(state, torch.device("xla", 0))
    assert Abacus.state == 9
