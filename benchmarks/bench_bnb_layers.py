"""Quantised layers beside bitsandbytes' own: forward, and forward with backward, on the CPU.

Both have the same weights, compute in the same dtype and get the same inputs; bitsandbytes' layers are kept from
repacking themselves in evaluation (`support_avx512bf16_for_cpu = False`) except beside `fast_inference`. Times are
those of pairs of blocks, see `_measure.interleave`. Target: 1.02.

In evaluation, int8-training is not compared: bitsandbytes has no such kernel for the CPU.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from _measure import interleave, keep_freed_memory, print_table, verdict
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn

from precision_bnb import MODES, BitsandbytesPrecision, fast

TARGET = 1.02


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantised layers beside bitsandbytes' own.")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    layer, rows = nn.Linear(options.width, options.width), []
    for mode in MODES:
        for dtype in (torch.float32, torch.bfloat16):
            for what, make in (("evaluation", evaluation), ("forward", forward), ("and backward", backward)):
                if (mode, what) == ("int8-training", "evaluation"):
                    continue
                x = torch.randn(options.batch, options.width, dtype=dtype)
                mine, other = ours(layer, mode, dtype), theirs(layer, mode, dtype)
                rows.append(row(mode, dtype, what, make(mine, x), make(other, x), options.rounds))
    if fast.is_available():
        config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "fast_inference": True}
        for batch in (1, 64):
            x = torch.randn(batch, options.width, dtype=torch.bfloat16)
            mine, other = ours(layer, config, torch.bfloat16), theirs(layer, "nf4", torch.bfloat16)
            other.support_avx512bf16_for_cpu = True
            steps = evaluation(mine, x), evaluation(other, x)
            rows.append(row("nf4, fast", torch.bfloat16, f"evaluation of {batch}", *steps, options.rounds))
    head = ["mode", "computes in", "what", "ours ms", "bitsandbytes ms", "ratio", "quartiles", "target"]
    print_table(f"one layer of {options.width} x {options.width}, batch {options.batch}", head, rows)


def row(mode: str, dtype: torch.dtype, what: str, mine: Any, other: Any, rounds: int) -> list[str]:
    mine(), other()
    result = interleave(mine, other, rounds, 2)
    times = [f"{1e3 * seconds:.2f}" for seconds in (result.ours, result.theirs)]
    spread = f"{result.low:.3f} to {result.high:.3f}"
    name = str(dtype).removeprefix("torch.")
    return [mode, name, what, *times, f"{result.ratio:.3f}", spread, verdict(round(result.ratio, 3), TARGET)]


def ours(layer: nn.Linear, mode: Any, dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(layer))
    base = "32-true" if dtype is torch.float32 else "bf16-true"
    return BitsandbytesPrecision(mode, dtype, base=base).convert_module(model)[0]  # type: ignore[index]


def theirs(layer: nn.Linear, mode: str, dtype: torch.dtype) -> Any:
    config, layer = MODES[mode], copy.deepcopy(layer).to(dtype)
    new: Any
    if config.load_in_4bit:
        options = {"quant_type": config.bnb_4bit_quant_type, "compress_statistics": config.bnb_4bit_use_double_quant}
        new = Linear4bit(layer.in_features, layer.out_features, compute_dtype=dtype, **options)
        new.weight = Params4bit(layer.weight.data, requires_grad=False, module=new, **options)
        new.bias = layer.bias
        new.support_avx512bf16_for_cpu = False
    else:
        floats, threshold = config.llm_int8_has_fp16_weight, config.llm_int8_threshold
        new = Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=floats, threshold=threshold)
        new.load_state_dict(layer.state_dict())
        new.to(dtype if floats else torch.float32)
    return new.to("cpu")


def evaluation(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    layer.eval()

    def step() -> None:
        with torch.no_grad():
            layer(x)

    return step


def forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    layer.train()
    x = x.clone().requires_grad_()
    return lambda: layer(x)


def backward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    layer.train()
    x = x.clone().requires_grad_()

    def step() -> None:
        layer.zero_grad()  # to None: else bitsandbytes' int8-training computes with old codes
        layer(x).sum().backward()

    return step


if __name__ == "__main__":
    main()
