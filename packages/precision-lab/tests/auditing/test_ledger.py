"""The ledger's bytes are those of the tensors."""

from __future__ import annotations

import torch
from torch import nn

from precision_lab.auditing.context import audit
from precision_lab.auditing.observed import named, observed, sentence


def test_bytes_by_part_and_module() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    with audit() as report:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.randn(3, 8)).float().pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    parts = report.ledger.parts
    assert parts["params"] == {"float32": 4 * (32 + 4 + 8)}
    assert parts["optimizer state"] == {"float32": 2 * 4 * (32 + 4 + 8)}
    assert parts["gradients"] == {"float32": 4 * (32 + 4 + 8)}
    assert parts["buffers"] == {"float32": 4 * 8, "int64": 8}
    assert parts["products, forward"] == {"bfloat16": 2 * 2 * 3 * 4}
    assert parts["products, backward"] == {"bfloat16": 2 * 2 * 4 * 8}
    assert report.ledger.modules["0"]["products, forward"] == {"bfloat16": 2 * 2 * 3 * 4}
    assert report.ledger.states == {"exp_avg": {"float32": 176}, "exp_avg_sq": {"float32": 176}}
    assert parts["loss"] == {"float32": 8} and report.record.steps == 2
    assert named(observed(report.record)) is None  # a float32 output of batch norm's is cast by nobody
    assert sentence(report.record).startswith("No mode of ours trains like this: params float32, compute bfloat16")


def test_saved_activations_are_what_torch_saves() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(4, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    expected = sum(size for pointer, size in storages.items() if pointer not in weights)
    with audit() as report:
        model(x).sum().backward()
    assert report.ledger.parts["saved activations"] == {"float32": expected} and expected == 2 * 4 * 4 * 8
