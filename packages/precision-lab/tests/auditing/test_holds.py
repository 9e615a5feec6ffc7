"""What a buffer holds is told by its values."""

from __future__ import annotations

import pytest
import torch

from precision_lab.auditing.holds import holds, rounded_to

HALF = torch.bfloat16
FREQUENCIES = 1 / 10000 ** (torch.arange(0, 64, 2) / 64)
ANGLES = torch.outer(torch.arange(100.0), FREQUENCIES)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (FREQUENCIES.to(HALF), "frequencies"),
        (FREQUENCIES.half()[None, :, None], "frequencies"),
        (FREQUENCIES.to(HALF).float(), "frequencies"),
        (torch.arange(512).to(HALF), "positions"),
        (torch.arange(4096)[None].half(), "positions"),
        (ANGLES.cos().to(HALF), "angles"),
        (torch.cat([ANGLES.sin(), ANGLES.cos()], -1)[None, None].to(HALF), "angles"),
        (torch.stack([ANGLES.sin(), ANGLES.cos()], -1).flatten(1).half(), "angles"),
    ],
)
def test_rounded_tables(tensor: torch.Tensor, expected: str) -> None:
    assert holds(tensor) == expected


@pytest.mark.parametrize(
    "tensor",
    [
        FREQUENCIES,
        ANGLES.cos(),
        torch.arange(200).to(HALF),  # every number is held
        torch.arange(512),
        torch.randn(100, 64).to(HALF),
        torch.randn(64).abs().to(HALF).float(),
        torch.ones(64, 64).tril().to(HALF),
        torch.eye(64).to(HALF),
        torch.linspace(1, 0.1, 64).to(HALF),
        torch.zeros(64, dtype=HALF),
        torch.tensor([1.0, 0.5, 0.25, 0.125]),
        torch.empty(64, 64, dtype=HALF, device="meta"),
    ],
)
def test_others(tensor: torch.Tensor) -> None:
    assert holds(tensor) == ""


def test_names_tell_of_scaled_frequencies_and_of_statistics() -> None:
    scaled = torch.cat([FREQUENCIES[:16], FREQUENCIES[16:] / 8]).to(HALF)
    assert holds(scaled) == "" and holds(scaled, "rotary.inv_freq") == "frequencies"
    assert holds(torch.rand(8).to(HALF), "bn.running_var") == "statistics" != holds(torch.rand(8), "bn.running_var")


def test_what_was_rounded_is_told_from_a_grid() -> None:
    assert rounded_to(FREQUENCIES.to(HALF).float()) is HALF
    assert rounded_to(FREQUENCIES.half().float()) is torch.float16
    assert rounded_to(1 / 10000 ** (torch.arange(0, 8, 2) / 8).half().float()) is None
    assert rounded_to((1 / 10000 ** (torch.arange(0, 8, 2) / 8)).half().float()) is torch.float16  # of 4 frequencies
    assert rounded_to(FREQUENCIES) is rounded_to(FREQUENCIES.half()) is None
    assert rounded_to(torch.arange(0, 100, 0.25)) is rounded_to(torch.linspace(-1, 1, 65)) is None
