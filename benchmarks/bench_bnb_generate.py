"""Tokens per second of transformers' `generate` on nf4 weights: with `fast_inference`, and without. On the CPU.

Both models have the same random weights and compute in bfloat16; batch 1, greedy. Times are those of pairs of whole
calls, see `_measure.interleave`, by the clock and by the process's CPU time. Target: 1.5 times as many. With other work
on the machine set OMP_WAIT_POLICY=passive, or threads that wait for each other are what is measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _measure import interleave, print_table, verdict
from transformers import LlamaConfig, LlamaForCausalLM

from precision_bnb import BitsandbytesPrecision

TARGET = 1 / 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description="Generation with the CPU's fused kernel and without.")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fast, plain = (generation(options.hidden, options.layers, options.tokens, fused) for fused in (True, False))
    fast(), plain()
    rows = []
    for what, clock in (("by the clock", time.perf_counter), ("of CPU time", time.process_time)):
        result = interleave(fast, plain, options.pairs, 1, clock)
        rates = [f"{options.tokens / seconds:.1f}" for seconds in (result.ours, result.theirs)]
        times = f"{1 / result.ratio:.2f}", f"{1 / result.high:.2f} to {1 / result.low:.2f}"
        rows.append([f"a second {what}", *rates, *times, verdict(result.ratio, TARGET)])
    title = f"{options.tokens} tokens, hidden {options.hidden}, {options.layers} layers, {options.threads} threads"
    print_table(title, ["tokens", "fast", "plain", "times as many", "quartiles", "target (time)"], rows)


def generation(hidden: int, layers: int, tokens: int, fused: bool) -> Callable[[], object]:
    """Returns what generates `tokens` tokens after a prompt of 16."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16)).eval().requires_grad_(False)
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "fast_inference": fused}
    BitsandbytesPrecision(config, torch.bfloat16).convert_module(model)
    ids = torch.arange(5, 21)[None]
    count = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **count)


if __name__ == "__main__":
    main()
