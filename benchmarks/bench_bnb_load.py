"""Quantising a float32 safetensors file of 400 MB into nf4: peak memory and time, beside transformers.

A Llama of two layers with random weights is written to a folder; each measurement is a fresh process.

    ours          fabric.init_module(), fabric.load_module(folder, model)
    transformers  from_pretrained(folder, quantization_config=BitsAndBytesConfig(...)), accelerate's device_map="cpu"
    bitsandbytes  quantize_4bit of each weight, whole, with all weights in memory: the time that the others cannot beat

Memory is RssAnon, read from /proc each millisecond: mapped pages of the file are not in it, they are the file's. Its
growth over the value before loading has its target: 1.15 times the quantised model and one float layer, the largest.
What stays is its growth after loading, garbage collected; of that, what malloc gives back when it is asked to. A small
model is loaded first, which imports what loading needs. transformers leaves what it does not quantise mapped, which
RssAnon does not count; ours copies it: 16 of 70 MiB here.
The target for time is 1.1 times bitsandbytes' calls: CPU time of the thread that loads, the best of several processes.
Beside transformers, processes come in pairs, one after the other: medians and quartiles of ours over theirs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import print_table, verdict

MIB = 2**20
WIDTH, INNER, LAYERS, VOCABULARY = 2048, 5504, 2, 1000
SMALL = 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantising a file, beside transformers.")
    parser.add_argument("--child", choices=tuple(CHILDREN))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        names = ("ours", "transformers")
        pairs = [
            {name: run(name, folder) for name in (names if index % 2 else names[::-1])}
            for index in range(options.pairs)
        ]
        floor = min(run("bitsandbytes", folder)["seconds"] for _ in range(min(3, options.pairs)))
    rows = []
    for name in names:
        runs = [pair[name] for pair in pairs]
        seconds, peak = min(each["seconds"] for each in runs), max(each["peak"] for each in runs)
        limit = 1.15 * runs[0]["quantised"] + runs[0]["largest"]
        cells = [f"{value / MIB:.0f}" for value in (peak, runs[0]["quantised"], runs[0]["largest"])]
        cells += [verdict(peak / MIB, round(limit / MIB)), f"{seconds:.2f}", f"{floor:.2f}"]
        rows.append([name, *cells, f"{seconds / floor:.2f}", verdict(round(seconds / floor, 2), 1.1)])
    head = ["who", "peak MiB", "quantised", "largest float", "target", "seconds", "bitsandbytes", "ratio", "target"]
    print_table(f"{pairs[0]['ours']['file'] / 1e6:.0f} MB of float32 into nf4", head, rows)
    rows = []
    for what in ("seconds", "peak", "stays", "trimmed"):
        ratios = [pair["ours"][what] / pair["transformers"][what] for pair in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append([what, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", verdict(round(middle, 2), 1.0)])
    print_table(f"ours over transformers', {len(pairs)} pairs", ["what", "median", "quartiles", "target"], rows)


def run(name: str, folder: str) -> dict[str, Any]:
    """Returns what a process measures."""
    command = [sys.executable, __file__, "--child", name, "--folder", folder]
    return json.loads(subprocess.check_output(command).splitlines()[-1])


def config(part: int = 1) -> Any:
    """Returns the model's config, with a `part`-th of its width and vocabulary."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": WIDTH // part, "intermediate_size": INNER // part, "vocab_size": VOCABULARY // part}
    return LlamaConfig(**sizes, num_hidden_layers=LAYERS, num_attention_heads=16, max_position_embeddings=256)


def write(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(config()).save_pretrained(folder)
    LlamaForCausalLM(config(SMALL)).save_pretrained(folder / "small")


# ---------------------------------------------------------------- children


def ours(folder: Path) -> dict[str, Any]:
    from transformers import LlamaForCausalLM

    import precision_bnb
    import precision_bnb.huggingface
    from precision_core import Fabric

    fabric = Fabric(accelerator="cpu", precision=precision_bnb.BitsandbytesPrecision("nf4", torch.float32))
    models = {}
    for part in (SMALL, 1):
        with fabric.init_module():
            models[part] = LlamaForCausalLM(config(part))

    def load(folder: Path, part: int) -> Any:
        fabric.load_module(folder, models[part])
        return models[part]

    return measured(load, folder)


def transformers(folder: Path) -> dict[str, Any]:
    import bitsandbytes  # noqa: F401 - not to be timed
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load(folder: Path, part: int) -> Any:
        return LlamaForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map="cpu", dtype=torch.float32
        )

    return measured(load, folder)


def bitsandbytes(folder: Path) -> dict[str, Any]:
    import bitsandbytes.functional as bnb
    import safetensors.torch

    state = safetensors.torch.load_file(folder / "model.safetensors")
    weights = [value.clone() for key, value in state.items() if "proj" in key]
    start = time.thread_time()
    for weight in weights:
        bnb.quantize_4bit(weight, quant_type="nf4")
    return {"seconds": time.thread_time() - start}


def measured(load: Callable[[Path, int], Any], folder: Path) -> dict[str, Any]:
    load(folder / "small", SMALL)  # what is imported, and what libraries allocate on first use
    before, peak = anonymous(), 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.thread_time()
    model = load(folder, 1)
    seconds = time.thread_time() - start
    done.set()
    watcher.join()
    gc.collect()
    stays = anonymous() - before
    ctypes.CDLL(None).malloc_trim(0)
    trimmed = anonymous() - before
    tensors = {value.data_ptr(): value.nbytes for value in model.state_dict().values()}
    file = (folder / "model.safetensors").stat().st_size
    sizes = {"file": file, "quantised": sum(tensors.values()), "largest": 4 * WIDTH * INNER}
    return {"seconds": seconds, "peak": max(peak - before, stays), "stays": stays, "trimmed": trimmed, **sizes}


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


CHILDREN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "ours": ours,
    "transformers": transformers,
    "bitsandbytes": bitsandbytes,
}


if __name__ == "__main__":
    main()
