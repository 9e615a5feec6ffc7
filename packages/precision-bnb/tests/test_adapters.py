"""peft around layers that were Conv1D: their weight turns round when it is packed, and again when it is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_bnb import BitsandbytesPrecision, QuantizedLinear, dequantize

peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


class Body(nn.Module):
    """A square layer, which fits either way round, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.square, self.wide = Conv1D(64, 64), Conv1D(96, 64)
            for layer in (self.square, self.wide):
                layer.weight.data.normal_(std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.tanh(self.square(x)))


def adapted(model: nn.Module, dora: bool) -> Any:
    config = peft.LoraConfig(
        r=4, target_modules=["square", "wide"], init_lora_weights=False, use_dora=dora, fan_in_fan_out=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # peft sees a linear layer
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("peft_first", [True, False], ids=["peft_first", "quantised_first"])
@pytest.mark.parametrize("mode", ["nf4", "int8", "int8-training"])
def test_adapters_of_conv1d_are_applied_and_merged_the_right_way_round(mode: str, peft_first: bool, dora: bool) -> None:
    if (mode, peft_first, dora) == ("int8-training", False, True):
        pytest.skip("peft takes the norms of a weight that is (columns, rows); the README says so")
    plugin = BitsandbytesPrecision(mode, torch.float32)
    model = adapted(Body() if peft_first else plugin.convert_module(Body()), dora)
    plugin.convert_module(model)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    mine = model(x)
    floats = dequantize(copy.deepcopy(model))
    exact, merged = floats(x), copy.deepcopy(floats).merge_and_unload()
    tolerance = 0.02 if mode == "int8-training" else 1e-5  # of that, the weights are not rounded
    assert (mine - exact).norm() < tolerance * exact.norm()
    assert type(merged.square) is type(merged.wide) is Conv1D
    assert (merged(x) - exact).norm() < 1e-5 * exact.norm()
    plain = Body()
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(plain(x), merged(x))
    if mode != "int8-training":
        assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 2
