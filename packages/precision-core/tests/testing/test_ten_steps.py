"""What `reads_of_ten_steps` counts: reads of ten steps, of the model it is given, by where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import Fabric, MixedPrecision
from precision_core.testing import reads_of_ten_steps, small_model


class Asks(nn.Module):
    """Reads a value in forward, and by choice one in backward."""

    def __init__(self, hook: Callable[[torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        self.layer, self.hook = nn.Linear(64, 4), hook

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(x)
        if self.hook is not None:
            output.register_hook(self.hook)
        return output * float(x[0, 0] > -9)


@pytest.mark.parametrize(
    ("hook", "found"),
    [
        (None, {"testing/test_ten_steps.py forward": 10}),
        (lambda grad: bool(grad.any()) and grad, {"testing/test_ten_steps.py forward": 10,
                                                  "testing/test_ten_steps.py <lambda>": 10}),
    ],
)  # fmt: skip
def test_reads_of_forward_and_backward_count_once_a_step(hook: Any, found: dict[str, int]) -> None:
    assert reads_of_ten_steps(Fabric("cpu"), Asks(hook)) == found


def test_no_mode_of_core_reads_and_each_way_to_ask_does() -> None:
    def of(mode: str, **options: Any) -> dict[str, int]:
        found = reads_of_ten_steps(Fabric("cpu", precision=mode), **options)
        return {where.partition(" ")[0]: count for where, count in found.items()}

    assert of("bf16-mixed", skipped=True) == of("16-mixed", clip={"max_norm": 1.0}) == {}
    assert of("16-mixed", fused=False) == {"scaling/loss_scaler.py": 10}
    assert of("16-mixed", skipped=True) == {"scaling/counters.py": 10}


def test_a_skipped_step_is_none_to_count() -> None:
    fabric = Fabric("cpu", precision=MixedPrecision("16-mixed", device="cpu", scaler={"init_scale": 2.0**40}))
    with pytest.raises(AssertionError, match="a step was skipped"):
        reads_of_ten_steps(fabric, skipped=True)


def test_the_model_is_the_same_each_time_and_grows_by_layers() -> None:
    for layers in (1, 2, 5):
        one, other = small_model(layers), small_model(layers)
        assert len(list(one.parameters())) == 4 * layers - 2
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
