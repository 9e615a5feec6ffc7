"""Frozen parts that are cast in each step, weights that should be one, quantised layers."""

from __future__ import annotations

import copy

import pytest
import torch
from planted import AUTOCAST, audited, found, mlp, train
from torch import Tensor, nn

from precision_lab.auditing.report import Report

HALF = torch.bfloat16
X = torch.randn(8, 16)


def codes(report: Report) -> list[str]:
    return [each.code for each in report.findings if each.level != "info"]


# ------------------------------------------------------------------ frozen


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(out=16).requires_grad_(False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def test_a_frozen_encoder_is_cast_in_each_step() -> None:
    finding = found(audited(lambda: train(Frozen(), X, context=AUTOCAST)), "frozen-recast")
    assert finding.level == "info" and finding.module == "encoder"
    assert (
        "4 frozen float32 parameters" in finding.what and "1.1 KiB a step" in finding.what
    )  # (256 + 16) * 2 * 2 bytes


def test_a_frozen_encoder_in_half_is_right() -> None:
    model = Frozen()
    model.encoder[0].to(HALF), model.encoder[3].to(HALF)
    assert audited(lambda: train(model, X, context=AUTOCAST)).findings == []
    assert audited(lambda: train(mlp(), X, context=AUTOCAST)).findings == []


# ------------------------------------------------------------------ tied


class Language(nn.Module):
    def __init__(self, tied: str) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 50, bias=False)
        if tied == "tied":
            self.lm_head.weight = self.embed.weight
        elif tied == "rounded":
            self.lm_head.weight = nn.Parameter(self.embed.weight.detach().to(HALF).float())
        elif tied == "copied":
            self.lm_head.weight = nn.Parameter(self.embed.weight.detach().clone())
        elif tied == "data":
            self.lm_head.weight.data = self.embed.weight.data

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.body(self.embed(ids)))


IDS = torch.randint(50, (8, 4))


@pytest.mark.parametrize("tied", ["copied", "data", "rounded"])
def test_weights_that_are_equal_and_two(tied: str) -> None:
    finding = found(audited(lambda: train(Language(tied), IDS)), "untied-weights")
    assert finding.level == "warning" and finding.sure == "likely" and finding.module == "lm_head"
    assert "embed.weight and lm_head.weight are two parameters" in finding.what


def test_a_load_that_unties() -> None:
    model = Language("tied")
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert found(audited(lambda: train(model, IDS)), "untied-weights").module == "lm_head"


def test_a_cast_of_one_of_two_names() -> None:
    model = Language("tied")
    model.embed.weight = nn.Parameter(model.embed.weight.detach().to(HALF))
    model.body.to(HALF)
    report = audited(lambda: train(model, IDS, context=AUTOCAST))
    assert found(report, "untied-weights").module == "lm_head"


@pytest.mark.parametrize("tied", ["tied", "never"])
def test_tied_weights_and_others_are_right(tied: str) -> None:
    assert audited(lambda: train(Language(tied), IDS)).findings == []


def test_a_network_and_its_copy_are_right() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online = Language("never")
            self.target = copy.deepcopy(self.online)

        def forward(self, ids: Tensor) -> Tensor:
            return self.online(ids) - self.target(ids)

    assert codes(audited(lambda: train(Both(), IDS))) == []


def test_weights_that_all_are_zero_are_right() -> None:
    model = Language("never")
    nn.init.zeros_(model.lm_head.weight)
    nn.init.zeros_(model.embed.weight)
    assert codes(audited(lambda: train(model, IDS))) == []


@pytest.mark.full
def test_a_configuration_that_ties() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    ids = torch.randint(100, (2, 8))

    def run(model: nn.Module) -> Report:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loop() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        return audited(loop)

    model = transformers.LlamaForCausalLM(config)
    assert run(model).findings == []
    model.lm_head.weight = nn.Parameter(torch.randn(100, 16))
    finding = found(run(model), "untied-weights")
    assert finding.sure == "certain" and "config.tie_word_embeddings is True" in finding.what
    assert "model.tie_weights()" in finding.remedy.transformers


# ------------------------------------------------------------------ quantised


class Int8(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.randint(-128, 127, (16, 16), dtype=torch.int8))
        self.adapter = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype) / 100) + self.adapter(x)


def test_a_weight_of_8_bits_is_dequantised_in_each_step() -> None:
    report = audited(lambda: train(nn.Sequential(Int8(), nn.GELU(), nn.Linear(16, 4)), X, context=AUTOCAST))
    finding = found(report, "dequantised-each-step")
    assert finding.level == "info" and finding.module == "0" and "1 times a step, 1.0 KiB" in finding.what


def test_bytes_of_a_batch_are_right() -> None:
    images = torch.randint(255, (8, 16), dtype=torch.uint8)

    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.float() / 255)

    assert audited(lambda: train(Bytes(), images, context=AUTOCAST)).findings == []


@pytest.mark.full
def test_layers_of_bitsandbytes_are_dequantised_in_each_step() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=HALF, quant_type="nf4").requires_grad_(False)
            self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    model = nn.Sequential(Adapted(), nn.GELU(), Adapted()).to("cpu")
    report = audited(lambda: train(model, torch.randn(8, 64), context=AUTOCAST))
    finding = found(report, "dequantised-each-step")
    assert finding.level == "info" and "base" in finding.module and codes(report) == []
