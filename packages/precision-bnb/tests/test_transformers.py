"""A Llama of transformers: it generates, trains adapters, and comes from a file, in the modes that it is used in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from precision_bnb import BitsandbytesPrecision, QuantizedLinear, dequantize
from precision_core import Fabric

transformers = pytest.importorskip("transformers")


def llama() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "vocab_size": 50}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_it_generates_as_the_dequantised_model_does(mode: str, tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision(mode, torch.float32))
    fabric.save_module(tmp_path / "model.safetensors", llama())
    with fabric.init_module():
        model = transformers.LlamaForCausalLM(llama().config).eval()
    fabric.load_module(tmp_path / "model.safetensors", model)
    fabric.setup(model)
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 14
    assert type(model.lm_head) is torch.nn.Linear
    plain = copy.deepcopy(model)
    dequantize(plain)
    ids = torch.tensor([[1, 5, 9, 2]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert generated.shape == (1, 12)
    with torch.no_grad():
        mine, exact = model(generated).logits, plain(generated).logits
    assert (mine - exact).norm() < (0.05 if mode == "int8" else 1e-4) * exact.norm()
    if mode == "nf4-dq":
        assert torch.equal(generated, plain.generate(ids, attention_mask=torch.ones_like(ids), **options))
