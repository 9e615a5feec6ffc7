"""Fine-tune a causal language model of transformers in bf16-mixed, and let it write.

    python examples/finetune_transformers.py --model HuggingFaceTB/SmolLM2-135M --text my.txt  # downloads the model
    python examples/finetune_transformers.py --model path/to/a/model --text my.txt             # no network
    python examples/finetune_transformers.py --tiny                                            # random weights, seconds

Needs precision-core, transformers and safetensors. Without --text it reads the language reference that every Python
ships as plain text.

Most checkpoints are bfloat16, and transformers 5 loads them so. Training them as they are would round away most updates
of a fine-tune's small learning rate; `upcast=True` makes what trains float32, which bf16-mixed computes in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from precision_core import Fabric

PROMPT = "An assignment statement"


class Bytes:
    """A tokenizer without files, for --tiny: an id for each byte."""

    eos_token_id = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Tensor) -> str:
        return bytes(ids.tolist()).decode(errors="replace")


def load(name: str | None) -> tuple[Any, Any]:
    """Returns the model and its tokenizer; a small one with random bfloat16 weights where `name` is None."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).bfloat16(), Bytes()


def read(path: Path | None) -> str:
    if path is not None:
        return path.read_text()
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Fine-tune a model of transformers on text.")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a name on the hub, or a folder")
    parser.add_argument("--text", type=Path, help="a file; default: Python's language reference")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--rate", type=float, default=2e-5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2, help="batches for one step")
    parser.add_argument("--length", type=int, default=512, help="tokens of each piece of text")
    parser.add_argument("--out", type=Path, help="where the tuned weights go, as safetensors")
    parser.add_argument("--tiny", action="store_true", help="random weights and a run of seconds on one CPU core")
    args = parser.parse_args(argv)
    if args.tiny:
        args.model, args.rate, args.steps, args.length, args.accelerator = None, 5e-3, 20, 64, "cpu"

    fabric = Fabric(args.accelerator, precision=args.precision, upcast=args.precision.endswith("mixed"))
    fabric.seed_everything(0)
    model, tokenizer = load(args.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate)
    model, optimizer = fabric.setup(model, optimizer)
    print(fabric.precision_plugin.report)  # what became float32, and what was left alone

    ids = torch.tensor(tokenizer.encode(read(args.text)))
    pieces = ids[: len(ids) // args.length * args.length].view(-1, args.length)
    held_out, training = pieces[-16:], pieces[:-16]
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(training, args.batch, shuffle=True, drop_last=True))

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        inputs = fabric.to_device(held_out)
        loss = model(input_ids=inputs, labels=inputs).loss.item()
        model.train()
        return loss

    def batches() -> Any:
        while True:
            yield from loader

    before, stream = evaluate(), batches()
    for step in range(1, args.steps + 1):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(args.accumulate):
            inputs = next(stream)
            loss = model(input_ids=inputs, labels=inputs).loss / args.accumulate  # transformers shifts the labels
            fabric.backward(loss)
            total += loss.detach()
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        if step % max(1, args.steps // 6) == 0:
            print(f"step {step}: loss {float(total):.3f}")
    after = evaluate()
    print(f"held out: {before:.3f} before, {after:.3f} after; parameters are {next(model.parameters()).dtype}")

    model.eval()  # `generate` calls forward, which runs in the precision wherever it is called from
    prompt = torch.tensor([tokenizer.encode(PROMPT)], device=fabric.device)
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    text = tokenizer.decode(written[0])
    print(text)
    if args.out:
        fabric.save_module(args.out, model)  # by transformers' names: `from_pretrained` reads it beside its config.json
    return {"before": before, "after": after, "dtype": next(model.parameters()).dtype, "text": text}


if __name__ == "__main__":
    main()
