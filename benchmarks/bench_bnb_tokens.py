"""Tokens per second of transformers' `generate`, per mode: ours beside bitsandbytes' own layers and beside bfloat16.

A Llama with layers of a 7B model's shape, fewer of them: divide by 32 / layers for a whole one. Random weights, batch
1, greedy, bfloat16, on the CPU. bitsandbytes' 4-bit layers repack themselves here where the CPU has AVX512-BF16, and
`fast` is ours with `fast_inference`, by the same kernel. Times are of whole calls in turns, so that what else the
machine does hits all alike: the median of each, and the ratio to bitsandbytes' with its quartiles. With other work on
the machine set OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _measure import print_table
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from precision_bnb import BitsAndBytesConfig, BitsandbytesPrecision, fast

MODES = ("nf4", "nf4-dq", "fp4", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Generation, per mode, beside bitsandbytes' own layers.")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", default=",".join(MODES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    floats = model_of(options.hidden, options.inner, options.layers)
    rows = []
    for mode in options.modes.split(","):
        models = {"bitsandbytes": theirs(copy.deepcopy(floats), mode), "ours": ours(copy.deepcopy(floats), mode)}
        if mode != "int8" and fast.is_available():
            models["fast"] = ours(copy.deepcopy(floats), mode, fast_inference=True)
        models["bfloat16"] = floats
        seconds = in_turns({name: generation(model, options.tokens) for name, model in models.items()}, options.rounds)
        for name, times in seconds.items():
            ratios = [other / mine for mine, other in zip(times, seconds["bitsandbytes"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rate = f"{options.tokens / statistics.median(times):.2f}"
            rows.append([mode, name, rate, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    title = f"{options.tokens} tokens, {options.hidden} x {options.inner}, {options.layers} layers, CPU time"
    print_table(title, ["mode", "layers", "tokens a second", "times bitsandbytes'", "quartiles"], rows)


def model_of(hidden: int, inner: int, layers: int) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, num_attention_heads=32, vocab_size=256, max_position_embeddings=128)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def ours(model: Any, mode: str, fast_inference: bool = False) -> Any:
    config: Any = {**vars(BitsAndBytesConfig.of(mode)), "fast_inference": fast_inference}
    return BitsandbytesPrecision(config, torch.bfloat16).convert_module(model)


def theirs(model: Any, mode: str) -> Any:
    config = BitsAndBytesConfig.of(mode)
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or name == "lm_head":
            continue
        shape = (layer.in_features, layer.out_features, False)
        new: Any
        if config.load_in_8bit:
            new = Linear8bitLt(*shape, has_fp16_weights=False, threshold=config.llm_int8_threshold)
        else:
            options = {
                "quant_type": config.bnb_4bit_quant_type,
                "compress_statistics": config.bnb_4bit_use_double_quant,
            }
            new = Linear4bit(*shape, compute_dtype=torch.bfloat16, **options)
        new.load_state_dict(layer.state_dict())
        model.set_submodule(name, new.to("cpu"))
    return model.eval().requires_grad_(False)


def generation(model: Any, tokens: int) -> Callable[[], object]:
    """Returns what generates `tokens` tokens after a prompt of 4."""
    ids = torch.arange(5, 9)[None]
    count = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **count)


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Returns the CPU seconds of each call, `rounds` times; the first round, in which layers repack, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in list(calls.items())[:: 1 if number % 2 else -1]:
            start = time.process_time()
            call()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


if __name__ == "__main__":
    main()
