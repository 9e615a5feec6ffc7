"""Of how many values the host waits for in ten steps of an engine: a table, so that a new DeepSpeed's shows itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from precision_core import Fabric
from precision_core.testing import reads_of_ten_steps, run_in_ranks, small_model
from precision_deepspeed import DeepSpeedStrategy

FINITE = {"runtime/utils.py is_invalid_grad_norm": 10}
"""ZeRO's step: is the norm of all gradients a number?"""
TRUE = FINITE | {"zero/stage_1_and_2.py has_overflow": 10}
"""Half gradients at stages 1 and 2 are also looked through beforehand."""
ALL = {"scaling/gradients.py <genexpr>": 10}
"""Stage 0: ours looks at all gradients at once."""
HALF = ALL | {"runtime/utils.py has_overflow": 10, "runtime/utils.py get_weight_norm": 20}
"""Stage 0 over half parameters, beside what DeepSpeed's own optimizer asks for."""
TABLE: dict[tuple[int, str], dict[str, int]] = {
    (0, "32-true"): {},
    (0, "bf16-mixed"): {},
    (0, "16-mixed"): ALL,
    (0, "bf16-true"): HALF,
    (1, "32-true"): FINITE,
    (1, "bf16-mixed"): FINITE,
    (1, "16-mixed"): FINITE,
    (1, "bf16-true"): TRUE,
    (1, "16-true"): TRUE,
    (2, "32-true"): FINITE,
    (2, "bf16-mixed"): FINITE,
    (2, "16-mixed"): FINITE,
    (2, "bf16-true"): TRUE,
    (2, "16-true"): TRUE,
    (3, "32-true"): FINITE,
    (3, "bf16-mixed"): FINITE,
    (3, "16-mixed"): FINITE,
    (3, "bf16-true"): FINITE,
    (3, "16-true"): FINITE | {"zero/stage3.py has_overflow": 10},
}
"""Stage and mode -> where it reads, with how often in ten steps. Streams, which a CPU has none of, are not in it."""


@contextmanager
def named_like_a_gpu() -> Iterator[None]:
    """Context in which DeepSpeed's accelerator calls its device "cpu:0", as CUDA's is "cuda:0": moves to it are none to
    the host."""
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch:
        kind = type(get_accelerator())
        patch.setattr(kind, "device_name", lambda self, index=None: "cpu:0")
        patch.setattr(kind, "current_device_name", lambda self: "cpu:0")
        yield


def reads(stage: int, modes: list[str], options: dict[str, Any], layers: int = 2) -> dict[str, dict[str, int]]:
    found = {}
    for mode in modes:
        fabric = Fabric("cpu", DeepSpeedStrategy(stage), precision=mode)
        with named_like_a_gpu():
            found[mode] = dict(reads_of_ten_steps(fabric, small_model(layers), **options))
    return found


@pytest.mark.parametrize("stage", range(4))
def test_ten_steps_read_what_the_table_says(stage: int, float16_ranks: Callable[..., Any]) -> None:
    of_stage = {mode: found for (at, mode), found in TABLE.items() if at == stage}
    assert run_in_ranks(1, float16_ranks, reads, stage, list(of_stage), {}) == [of_stage]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("mode", ["32-true", "bf16-true"])
def test_the_number_of_layers_is_no_matter(stage: int, mode: str) -> None:
    assert run_in_ranks(1, reads, stage, [mode], {}, 6) == [{mode: TABLE[stage, mode]}]


def more(first: dict[str, int], *others: dict[str, int]) -> dict[str, int]:
    return dict(sum(map(Counter, others), Counter(first)))


CLIPPED = {stage: {} if stage in (0, 3) else FINITE for stage in range(4)}
"""What the norm for `max_norm` adds: DeepSpeed asks whether it is a number."""


@pytest.mark.parametrize("stage", range(4))
def test_what_is_asked_for_is_read_beside_it(stage: int) -> None:
    mode, before = "bf16-mixed", TABLE[stage, "bf16-mixed"]
    norm = {"clip": {"max_norm": 1.0}}
    assert run_in_ranks(1, reads, stage, [mode], norm) == [{mode: more(before, CLIPPED[stage])}]
    assert run_in_ranks(1, reads, stage, [mode], {"skipped": True}) == [{mode: before}]
