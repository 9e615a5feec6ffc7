"""What number formats are worth where the model fills a GPU: tokens a second, the share of its peak, and memory.

A GPT of 1.3 billion parameters, or of what fits into half of the device's free memory, trains a few steps in each mode
with fused AdamW, through Fabric. Each mode's figures are printed as a line of JSON as soon as they are there, and all
of them as a table at the end. On a CPU the model is tiny, and the figures say only that the benchmark runs.

MFU: (6 parameters + 12 layers width context) operations a token, forward and backward, embeddings left out, as a share
of the dense peak that the vendor names for the mode's matrix products (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from typing import Any

import torch
from _measure import print_table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.optim import AdamW

from precision_core import Fabric

SIZES = ((32, 1), (64, 2), (256, 4), (768, 12), (1024, 24), (1536, 24), (2048, 24), (2560, 32), (4096, 32))
"""Width and layers; heads are 64 channels wide from width 768 on, as GPT-3's."""
STATE_BYTES = 16
"""Of a parameter in the modes that need most: float32 weight, gradient, and two moments of AdamW."""
PEAKS = {  # name in the device's name -> dense operations a second in half formats, TF32 and float32
    "H200": (989e12, 495e12, 67e12),
    "H100": (989e12, 495e12, 67e12),
    "A100": (312e12, 156e12, 19.5e12),
    "L40S": (362e12, 183e12, 91.6e12),
}


class Block(nn.Module):
    """Attention and MLP, each added to what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tokens (batch, position) -> logits (batch, position, vocabulary)."""

    def __init__(self, width: int, layers: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def count(width: int, layers: int, vocabulary: int, context: int) -> int:
    """Returns how many parameters the model has."""
    return layers * (12 * width**2 + 13 * width) + (2 * vocabulary + context + 2) * width


def size_for(parameters: float, vocabulary: int, context: int) -> tuple[int, int]:
    """Returns width and layers of the largest model with at most a tenth more parameters, else the smallest."""
    return max(
        (size for size in SIZES if count(*size, vocabulary, context) <= 1.1 * parameters), default=SIZES[0], key=sum
    )


def parameters_that_fit(device: torch.device) -> float:
    if device.type != "cuda":
        return 2e6
    free, _ = torch.cuda.mem_get_info(device)
    return min(1.3e9, free / 2 / STATE_BYTES)


def peak_of(device: torch.device, compute: torch.dtype) -> float | None:
    """Returns the device's operations a second in that dtype, None where nobody has written it down here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for part, (half, tf32, single) in PEAKS.items():
        if part in name:
            if compute in (torch.float16, torch.bfloat16):
                return half
            return single if torch.get_float32_matmul_precision() == "highest" else tf32
    return None


def measure(mode: str, given: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of a mode, or why there are none."""
    fabric = Fabric(given.accelerator, given.strategy, devices=1, precision=mode)
    device = fabric.device
    is_cuda = device.type == "cuda"
    width, layers = size_for(given.parameters or parameters_that_fit(device), given.vocabulary, given.context)
    figures: dict[str, Any] = {"mode": mode, "strategy": given.strategy, "width": width, "layers": layers}
    figures["parameters"] = count(width, layers, given.vocabulary, given.context)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        torch.manual_seed(0)
        with fabric.init_module():
            model = GPT(width, layers, given.vocabulary, given.context)
        optimizer = AdamW(model.parameters(), lr=1e-4, fused=True if is_cuda else None)
        fabric.setup(model, optimizer)
        ids = torch.randint(given.vocabulary, (given.batch, given.context + 1), device=device)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            fabric.backward(loss)
            optimizer.step()
            return loss.detach()

        first = step()
        for _ in range(given.warmup):
            step()
        _wait(device)
        begun = time.perf_counter()
        for _ in range(given.steps):
            last = step()
        _wait(device)
        seconds = time.perf_counter() - begun
    except torch.OutOfMemoryError:
        figures["why not"] = "out of memory"
        return figures
    finally:
        fabric.teardown()
    tokens = given.batch * given.context * given.steps / seconds
    multiplied = figures["parameters"] - (given.vocabulary + given.context) * width
    operations = tokens * (6 * multiplied + 12 * layers * width * given.context)
    peak = peak_of(device, fabric.precision_plugin.policy.compute)
    figures |= {"ms a step": round(1000 * seconds / given.steps, 2), "tokens a second": round(tokens)}
    figures["TFLOP/s"] = round(operations / 1e12, 3)
    figures["MFU"] = None if peak is None else round(operations / peak, 3)
    figures["peak GiB"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if is_cuda else None
    figures |= {"first loss": round(first.item(), 3), "last loss": round(last.item(), 3)}
    return figures


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    options = argparse.ArgumentParser(description="Tokens a second, MFU and memory of a large model in each format.")
    options.add_argument("--modes", nargs="+", default=["bf16-mixed", "bf16-true", "16-mixed", "32-true"])
    options.add_argument("--accelerator", default="auto")
    options.add_argument("--strategy", default="auto", help="fsdp, deepspeed, ddp: one process")
    options.add_argument("--parameters", type=float, help="default: 1.3e9, or what fits into half of the free memory")
    options.add_argument("--vocabulary", type=int, default=0, help="default: 32768, on a CPU 256")
    options.add_argument("--context", type=int, default=0, help="default: 1024, on a CPU 64")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--warmup", type=int, default=3)
    given, _ = options.parse_known_args()  # other benchmarks may be run with the same arguments
    on_gpu = given.accelerator != "cpu" and torch.cuda.is_available()
    given.vocabulary = given.vocabulary or (32768 if on_gpu else 256)
    given.context = given.context or (1024 if on_gpu else 64)
    found = []
    for mode in given.modes:
        found.append(measure(mode, given))
        print(json.dumps(found[-1]), flush=True)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    head = ["ms a step", "tokens a second", "TFLOP/s", "MFU", "peak GiB", "first loss", "last loss"]
    rows = [[each["mode"], *(_cell(each.get(name)) for name in head), each.get("why not", "")] for each in found]
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    size = f"{found[0]['parameters'] / 1e6:.1f} million parameters, {given.batch} x {given.context} tokens"
    print_table(f"formats on {device}, {given.strategy}: {size}", ["mode", *head, ""], rows)


def _cell(value: object) -> str:
    return "-" if value is None else f"{value}"


if __name__ == "__main__":
    main()
