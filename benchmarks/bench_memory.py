"""Peak memory of a training step through Fabric beside the loop written by hand, and of converting a model.

Counted are the bytes of live tensors: torch's profiler records each allocation and each release of its allocator,
temporaries inside of operators and what autograd saves included, and their running sum has a peak. That is exact and
the same each time, which the resident size of a process is not, so one process measures all; what libraries allocate
past torch is left out. Of a training run the third step counts, when gradients and optimizer state exist.

Targets: a step needs at most 1.02 times the hand-written loop's peak, and `HalfPrecision.convert_module` at most the
largest parameter on top of the model.
"""

from __future__ import annotations

import argparse
import gc
import os
import warnings
from collections.abc import Callable

import torch
from _loops import fabric_loop, hand_loop
from _measure import print_table, verdict
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from precision_core import MODES, HalfPrecision

WIDTH, BATCH = 512, 1024
TARGET_STEP, TARGET_CONVERSION = 1.02, 1.0
MIB = 2**20
LARGEST = 8 * MIB  # the bytes of the embedding


def main() -> None:
    argparse.ArgumentParser(description="Peak memory beside the hand-written loop.").parse_known_args()
    torch.set_num_threads(1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports each start and stop
    rows = []
    for mode in MODES:
        for clipped in (False, True):
            _, ours = step_peak("fabric", mode, clipped)
            _, theirs = step_peak("hand", mode, clipped)
            ratio = ours / theirs
            cells = [f"{ours / MIB:.3f}", f"{theirs / MIB:.3f}", f"{ratio:.4f}", verdict(ratio, TARGET_STEP)]
            rows.append([mode, "max_norm" if clipped else "-", *cells])
    head = ["mode", "clipping", "Fabric MiB", "by hand MiB", "ratio", "target"]
    print_table("peak of live tensors in a training step", head, rows)

    rows = []
    for name, buffers in (("parameters alone", False), ("a mask in each layer", True)):
        before, peak = conversion_peak(buffers)
        ratio = (peak - before) / LARGEST
        cells = [f"{each / MIB:.2f}" for each in (before, peak - before, LARGEST)]
        rows.append([name, *cells, f"{ratio:.3f}", verdict(ratio, TARGET_CONVERSION)])
    head = ["model", "MiB before", "MiB on top", "largest parameter", "ratio", "target"]
    print_table("HalfPrecision.convert_module", head, rows)


class Model(nn.Module):
    """An embedding and linear layers, each with a float32 mask of 512 positions on request, as transformers have."""

    def __init__(self, buffers: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LARGEST // (4 * 256), 256)
        self.layers = nn.Sequential(*[nn.Linear(256, 256) for _ in range(24)])
        if buffers:
            for layer in self.layers:
                layer.register_buffer("mask", torch.rand(512, 512))


def step_peak(who: str, mode: str, clipped: bool) -> tuple[int, int]:
    """Returns the live bytes before the third step and their peak in it."""
    loops = {"fabric": fabric_loop, "hand": hand_loop}

    def prepare() -> Callable[[], object]:
        _, step = loops[who](mode, clipped, WIDTH, BATCH)
        step()
        step()
        return step

    return peak_of(prepare)


def conversion_peak(buffers: bool) -> tuple[int, int]:
    """Returns the live bytes before the conversion and their peak in it."""
    warnings.simplefilter("ignore")  # of buffers that lose by the cast

    def prepare() -> Callable[[], object]:
        model, precision = Model(buffers), HalfPrecision("bf16-true")
        return lambda: precision.convert_module(model)

    return peak_of(prepare)


def peak_of(prepare: Callable[[], Callable[[], object]]) -> tuple[int, int]:
    """Returns the bytes of live tensors before the call of what `prepare` returns, and their peak during it."""
    gc.collect()  # so that no release of earlier tensors falls into this count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        measured = prepare()
        with record_function("measured"):
            measured()
    live, before, peak = 0, 0, -1
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "measured":
            before = peak = live
        elif event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live) if peak >= 0 else -1
    return before, peak


if __name__ == "__main__":
    main()
