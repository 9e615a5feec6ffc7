"""A GPT on bytes of text, on one device, or on several by DDP or FSDP2: the same script.

    python examples/train_gpt.py                                            # one device, bf16-mixed
    python examples/train_gpt.py --devices 8 --strategy fsdp --text my.txt
    torchrun --nproc-per-node=8 examples/train_gpt.py --strategy ddp        # torchrun starts them just as well
    python examples/train_gpt.py --tiny --devices 2 --strategy fsdp --accelerator cpu

Needs precision-core, for --strategy fsdp also precision-fsdp. Without --text it reads the language reference that every
Python ships as plain text; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from precision_core import Fabric


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes (batch, position) -> logits (batch, position, 256) of the byte that follows each."""

    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(layers))  # FSDP gathers block by block
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        nn.init.normal_(self.embedding.weight, std=0.05)
        nn.init.normal_(self.position.weight, std=0.05)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Windows(Dataset[Tensor]):
    """The text, cut into pieces of `context` + 1 bytes that begin every `context` bytes."""

    def __init__(self, text: bytes, context: int) -> None:
        self.data, self.context = torch.frombuffer(bytearray(text), dtype=torch.uint8), context

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.context
        return self.data[start : start + self.context + 1].long()


def read(path: Path | None) -> bytes:
    if path is not None:
        return path.read_bytes()
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics)).encode()


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Train a GPT on text.")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--strategy", default="auto", help="auto (one device, or ddp), ddp, fsdp, deepspeed")
    parser.add_argument("--devices", default="auto", help="processes on this machine, one a device")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--text", type=Path, help="a file; default: Python's language reference")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="windows a process and step")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--checkpoint", type=Path, help="saved at the end; --resume goes on from it")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a model and a run of seconds on one CPU core")
    args = parser.parse_args(argv)
    if args.tiny:
        args.steps, args.batch, args.width, args.layers, args.context = 60, 8, 64, 2, 64

    devices = args.devices if args.devices == "auto" else int(args.devices)
    fabric = Fabric(args.accelerator, args.strategy, devices, args.precision)
    fabric.launch()  # starts this script again in each further process; nothing to do on one device
    fabric.seed_everything(0)
    text = read(args.text)
    training, held_out = (Windows(part, args.context) for part in (text[: -len(text) // 10], text[-len(text) // 10 :]))
    loader = fabric.setup_dataloaders(DataLoader(training, args.batch, shuffle=True, drop_last=True))
    model = GPT(args.width, args.layers, args.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99))
    model, optimizer = fabric.setup(model, optimizer)  # the same objects; under FSDP they hold shards from here on
    state = {"model": model, "optimizer": optimizer, "loader": loader, "step": 0}
    if args.resume:
        fabric.load(args.checkpoint, state)  # goes on bit for bit, the rest of the epoch included

    while state["step"] < args.steps:
        for windows in loader:
            optimizer.zero_grad()
            loss = loss_of(model, windows)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)  # the norm over all shards
            optimizer.step()
            state["step"] += 1
            if state["step"] % (args.steps // 6) == 0:
                # .item() waits for the device, so not in each step
                fabric.print(f"step {state['step']}: loss {fabric.all_reduce(loss).item():.3f} nats per byte")
            if state["step"] == args.steps:
                break
    with torch.no_grad():  # on all ranks, which hold a shard each under FSDP
        windows = fabric.to_device(torch.stack([held_out[index] for index in range(32)]))
        result = fabric.all_reduce(loss_of(model, windows)).item()
    fabric.print(f"held out: {result:.3f} nats per byte; {fabric!r}")
    if args.checkpoint:
        fabric.save(args.checkpoint, state)
    return {"held_out": result, "ranks": fabric.world_size}


if __name__ == "__main__":
    main()
