"""QLoRA: a language model in 4 bits with adapters that train, on one device or sharded by FSDP2.

    python examples/qlora.py --model meta-llama/Llama-3.2-1B --text my.txt       # downloads the model
    python examples/qlora.py --model folder --strategy fsdp --devices 4          # config.json and model.safetensors
    python examples/qlora.py --tiny                                              # random weights, seconds
    python examples/qlora.py --tiny --strategy fsdp --devices 2 --accelerator cpu

Needs precision-core, precision-bnb, transformers, peft and safetensors, for --strategy fsdp also precision-fsdp.
Without --text it reads the language reference that every Python ships as plain text.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from precision_bnb import BitsandbytesPrecision
from precision_core import Fabric


def folder_of(name: str | None, fabric: Fabric) -> Path:
    """Returns the folder with the model's files: a local one, the hub's after a download, or a small random model's."""
    if name is None:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        folder = Path(fabric.broadcast(tempfile.mkdtemp(prefix="qlora-")))  # rank zero's
        if fabric.is_global_zero:
            # a frozen head of usual size, 0.02, could not make large logits
            LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.1, **sizes)).save_pretrained(folder)
        fabric.barrier()
        return folder
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    with fabric.rank_zero_first():  # the others find it on disk
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer*"]))


def read(path: Path | None) -> str:
    if path is not None:
        return path.read_text()
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Train adapters around a model in 4 bits.")
    parser.add_argument("--model", default="meta-llama/Llama-3.2-1B", help="a name on the hub, or a folder")
    parser.add_argument("--text", type=Path, help="a file; default: Python's language reference")
    parser.add_argument("--mode", default="nf4", help="nf4, nf4-dq, fp4, int8")
    parser.add_argument("--strategy", default="auto", help="auto, ddp, fsdp")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="pieces of text a process and step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a piece")
    parser.add_argument("--out", type=Path, help="a checkpoint of the adapters alone")
    parser.add_argument("--tiny", action="store_true", help="random weights and a run of seconds on one CPU core")
    args = parser.parse_args(argv)
    if args.tiny:
        args.model, args.rate, args.steps, args.batch, args.length, args.accelerator = None, 2e-2, 25, 8, 64, "cpu"

    # Adapters train in float32 under bfloat16 autocast: in bfloat16 half of their small updates would come to nothing.
    precision = BitsandbytesPrecision(args.mode, dtype=torch.bfloat16)
    devices = args.devices if args.devices == "auto" else int(args.devices)
    fabric = Fabric(args.accelerator, args.strategy, devices, precision)
    fabric.launch()
    fabric.seed_everything(0)
    folder = folder_of(args.model, fabric)
    # FSDP's own context makes all on the meta device, tables of positions too, which are in no file. So there each rank
    # reads the 4-bit model into CPU memory, and `setup` leaves it a shard.
    with precision.module_init_context() if args.strategy == "fsdp" else fabric.init_module():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    files = [folder / "model.safetensors.index.json", folder / "model.safetensors"]
    # Quantised layer by layer as it is read: the float model is never in memory.
    fabric.load_module(next(file for file in files if file.exists()), model)
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)  # peft, unchanged: it freezes the rest
    model = fabric.setup(model)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(trained, lr=args.rate))
    fabric.print(str(fabric.precision_plugin.report).partition("\n  converted")[0])

    text = read(args.text)
    ids = list(text.encode()) if args.tiny else AutoTokenizer.from_pretrained(folder).encode(text)
    pieces = torch.tensor(ids[: len(ids) // args.length * args.length]).view(-1, args.length)
    held_out, training = fabric.to_device(pieces[-16:]), pieces[:-16]
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(training, args.batch, shuffle=True, drop_last=True))

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        loss: Tensor = model(input_ids=held_out, labels=held_out).loss
        model.train()
        return loss.item()

    before, step = evaluate(), 0
    while step < args.steps:
        for inputs in loader:
            optimizer.zero_grad()
            loss = model(input_ids=inputs, labels=inputs).loss
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            step += 1
            if step % max(1, args.steps // 5) == 0:
                fabric.print(f"step {step}: loss {fabric.all_reduce(loss).item():.3f}")
            if step == args.steps:
                break
    after = evaluate()
    fabric.print(f"held out: {before:.3f} before, {after:.3f} after")
    if args.out:
        fabric.save(args.out, {"model": model}, filter={"model": lambda name, _: "lora_" in name})
    packed = sum(param.dtype is torch.uint8 for param in model.parameters())
    return {"before": before, "after": after, "packed": packed, "ranks": fabric.world_size}


if __name__ == "__main__":
    main()
