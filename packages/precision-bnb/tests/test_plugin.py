"""The plugin: its base mode, what it converts and what not, what it refuses."""

from __future__ import annotations

import math
import pickle
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from precision_bnb import MODES, BitsandbytesPrecision, Int8TrainingLinear, QuantizedLinear, quantize
from precision_bnb.support import compute_dtype, rows
from precision_core import DDPStrategy, Fabric, SingleDeviceStrategy, supports


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
        self.head = nn.Linear(64, 8)
        self.lm_head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return self.lm_head(x) + self.head(x)


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(child).__name__ for name, child in model.named_modules() if isinstance(child, nn.Linear)}


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_entry_points(mode: str) -> None:
    fabric = Fabric(accelerator="cpu", precision=mode)
    plugin = fabric.precision_plugin
    assert isinstance(plugin, BitsandbytesPrecision) and plugin.mode == mode
    model = fabric.setup(Model())
    assert isinstance(model.head, Int8TrainingLinear if mode == "int8-training" else QuantizedLinear)
    assert type(model.lm_head) is nn.Linear


def test_support_says_what_the_machine_does() -> None:
    table = rows()
    assert {row.mode for row in table} == set(MODES) and len(table) == len({(row.mode, row.device) for row in table})
    for mode in MODES:
        assert supports(mode, "cpu") and not supports(mode, "mps")
    assert "dequantised for each product" in supports("nf4", "cpu").reason


def test_the_default_compute_dtype_is_what_the_device_computes_fast() -> None:
    fast = compute_dtype("cpu")
    assert fast is (torch.bfloat16 if supports("bf16-true", "cpu").level == "native" else fast)
    plugin: Any = Fabric(accelerator="cpu", precision="nf4").precision_plugin
    assert plugin.setup_bnb_config().bnb_4bit_compute_dtype is fast
    assert compute_dtype("meta") is torch.float32
    assert BitsandbytesPrecision("nf4", torch.float16).setup_bnb_config().bnb_4bit_compute_dtype is torch.float16
    transformers = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
    assert BitsandbytesPrecision(transformers).setup_bnb_config().bnb_4bit_compute_dtype is torch.float32


# ---------------------------------------------------------------- base


@pytest.mark.parametrize(
    ("dtype", "mode", "params"),
    [
        (torch.bfloat16, "bf16-mixed", torch.float32),
        (torch.float32, "32-true", torch.float32),
        (torch.float16, "16-mixed", torch.float32),
    ],
    ids=str,
)
def test_base_follows_the_compute_dtype(dtype: torch.dtype, mode: str, params: torch.dtype) -> None:
    plugin = BitsandbytesPrecision("nf4", dtype)
    model = plugin.convert_module(Model())
    assert str(plugin.policy) == mode and model.body[1].weight.dtype is params
    assert plugin.storage(model.body[1].weight) is params and plugin.storage(model.head.weight) is None
    assert plugin.forward_context() is not None and (plugin.scale > 1) is (mode == "16-mixed")


@pytest.mark.parametrize("native", [True, False], ids=["native bfloat16", "no native bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_what_trains_by_default_is_float32_whatever_the_cpu_is_fast_in(
    mode: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, biases, a head and a float layer by name train, whatever dtype they arrive in; no note warns."""
    dtype = torch.bfloat16 if native else torch.float32
    monkeypatch.setattr("precision_bnb.plugin.compute_dtype", lambda device_type: dtype)
    for arrives in (torch.float32, torch.bfloat16, torch.float16):
        plugin = BitsandbytesPrecision(mode, ignore_modules={"body.0", "lm_head"})
        fabric, model = Fabric(accelerator="cpu", precision=plugin), Model().to(arrives)
        optimizer = SGD(model.parameters(), lr=0.1)
        fabric.setup(model, optimizer)
        trains = {name: param.dtype for name, param in model.named_parameters() if param.requires_grad}
        assert set(trains.values()) == {torch.float32} and {"body.0.weight", "body.1.weight", "lm_head.weight"} <= {
            *trains
        }
        assert str(plugin.policy) == ("bf16-mixed" if native else "32-true") and plugin.report.notes == ()
        assert plugin.setup_bnb_config().bnb_4bit_compute_dtype is dtype
        before = model.body[1].bias.detach().clone()  # type: ignore[union-attr]
        fabric.backward(model(torch.ones(2, 64)).square().sum())
        optimizer.step()
        assert not torch.equal(model.body[1].bias, before)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("dtype", "frozen", "training"),
    [(torch.float16, "16-true", "16-mixed"), (torch.bfloat16, "bf16-true", "bf16-mixed")],
    ids=str,
)
def test_half_without_anything_to_train_is_true_until_adapters_come(
    dtype: torch.dtype, frozen: str, training: str
) -> None:
    fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision("nf4", dtype))
    plugin, model = fabric.precision_plugin, Model().requires_grad_(False)
    plugin.convert_module(model)
    assert str(plugin.policy) == frozen and model.body[1].weight.dtype is model.lm_head.weight.dtype is dtype
    assert plugin.report.notes == ()  # nothing trains, and nobody chose it
    model.adapter = nn.Linear(64, 64, dtype=dtype)  # type: ignore[assignment]
    packed = model.head.weight.clone()
    fabric.setup(model, SGD(model.adapter.parameters(), lr=0.1))
    assert str(plugin.policy) == training and plugin.scale == (2.0**16 if dtype is torch.float16 else 1.0)
    assert model.adapter.weight.dtype is torch.float32 and type(model.adapter) is nn.Linear
    assert model.lm_head.weight.dtype is dtype and torch.equal(model.head.weight, packed)
    assert model.body[1].weight.dtype is torch.float32  # a half norm takes no float32 input
    assert "body.1.weight" in {item.name for item in plugin.report.converted}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_frozen_model_that_begins_with_a_norm_runs_beside_one_that_trains(dtype: torch.dtype) -> None:
    class Normed(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.LayerNorm(64), nn.Linear(64, 64), nn.GroupNorm(4, 64), nn.Linear(64, 8))

    fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision("nf4", dtype))
    teacher, x = fabric.setup(Normed().requires_grad_(False)), torch.randn(4, 64)
    before = teacher(x)
    student = fabric.setup(Normed())
    assert (teacher(x) - before).norm() < 0.02 * before.norm() and student(x).dtype is torch.float32


def test_a_base_by_choice_takes_what_arrives_in_half() -> None:
    plugin = BitsandbytesPrecision("nf4", torch.bfloat16, base="bf16-mixed")
    model = plugin.convert_module(Model().bfloat16())
    assert {param.dtype for param in model.parameters() if param.requires_grad} == {torch.float32}
    plugin = BitsandbytesPrecision("nf4", torch.bfloat16, base="bf16-true")
    model = plugin.convert_module(Model())
    assert {param.dtype for param in model.parameters() if param.requires_grad} == {torch.bfloat16}
    assert "pure bfloat16 loses updates" in str(plugin.report)


class Rotary(Model):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, 64, 2) / 64), persistent=False)
        self.register_buffer("table", torch.linspace(0, 1, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rotary_frequencies_stay_float32_by_cores_table(dtype: torch.dtype) -> None:
    model, plugin = Rotary().requires_grad_(False), BitsandbytesPrecision("nf4", dtype)
    frequencies = model.inv_freq
    with pytest.warns(UserWarning, match=r"running statistics: table\. To keep them") as caught:
        plugin.convert_module(model)
    assert model.inv_freq is frequencies and model.table.dtype is dtype
    assert "inv_freq  kept in float32: rotary frequencies" in str(plugin.report)
    assert [name for name, _ in model.named_buffers()] == ["inv_freq", "table"]
    base = re.search(r'BitsandbytesPrecision\(base="(.*)"\)$', str(caught[0].message))
    assert base is not None
    wide = BitsandbytesPrecision("nf4", dtype, base=base[1]).convert_module(Rotary().requires_grad_(False))
    assert wide.inv_freq.dtype is wide.table.dtype is torch.float32 and wide.body[1].weight.dtype is dtype
    given = Rotary().requires_grad_(False)
    with pytest.warns(UserWarning, match=r"statistics: table\. To keep"):
        BitsandbytesPrecision("nf4", dtype, base=str(plugin.policy)).convert_module(given)
    assert given.inv_freq.dtype is torch.float32


def test_an_explicit_half_base_refuses_what_trains() -> None:
    plugin, model = BitsandbytesPrecision("nf4", torch.float16, base="16-true"), Model()
    with pytest.raises(ValueError, match=r"these train: body.0.bias, body.1.weight.*base=\"16-mixed\""):
        plugin.convert_module(model)
    assert type(model.head) is nn.Linear
    plugin.convert_module(model.requires_grad_(False))
    assert str(plugin.policy) == "16-true"
    with pytest.raises(ValueError, match=r"these train: .*head.weight"):
        BitsandbytesPrecision("int8-training", base="16-true").convert_module(Model())


def test_a_float16_base_with_masters_trains() -> None:
    fabric = Fabric("cpu", precision=BitsandbytesPrecision("nf4", torch.float16, base="16-master"))
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64))
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=1e-5)  # of a weight of 1 float16 has steps of 1e-3
    fabric.setup(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(2, 64)).square().mean())
        optimizer.step()
    steps = fabric.precision_plugin.steps
    master = optimizer.state[model[1].weight]["master_weight"]
    assert steps > 0 and model[1].weight.dtype is torch.float16 and model[1].weight.eq(1).all()
    assert (1 - master).max().item() == pytest.approx(steps * 1e-5, rel=0.02)


@pytest.mark.parametrize("base", ["bf16-mixed", "32-true", "64-true", "bf16-true; *.1: 32-true"])
def test_base_by_choice(base: str) -> None:
    fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision("int8", torch.bfloat16, base=base))
    model = fabric.setup(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8)))
    plugin = fabric.precision_plugin
    assert str(plugin.policy) == base and model[0].bias.dtype is plugin.policy.params
    x = torch.randn(4, 64, dtype=torch.float64 if base == "64-true" else torch.float32)
    output = model(x)
    assert output.dtype is plugin.policy.output
    output.sum().backward()
    assert model[0].bias.grad is not None


def test_a_base_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no mode"):
        BitsandbytesPrecision("nf4", base=8)
    with pytest.raises(ValueError, match="16"):
        BitsandbytesPrecision("nf4", base="fp16")


# ---------------------------------------------------------------- what is converted


def test_ignore_modules() -> None:
    for given, left in (
        ({"lm_head", "body"}, {"lm_head", "body.0", "body.2"}),
        ({"*.0"}, {"body.0"}),
        (None, {"lm_head"}),
    ):
        model, plugin = Model(), BitsandbytesPrecision("nf4", ignore_modules=given)
        plugin.convert_module(model)
        assert {name for name, kind in kinds(model).items() if kind == "Linear"} == left
    config = {"load_in_8bit": True, "llm_int8_skip_modules": ["head"]}
    model = BitsandbytesPrecision(config).convert_module(Model())
    assert {name for name, kind in kinds(model).items() if kind == "Linear"} == {"head"}
    with pytest.raises(ValueError, match=r"'heads' matches no module of this model; did you mean"):
        BitsandbytesPrecision("nf4", ignore_modules={"heads"}).convert_module(Model())


def test_what_a_model_keeps_wide_stays() -> None:
    """Names as transformers' models have them, on any part of the model, whatever `ignore_modules` says."""
    for parts, left in (
        (["head", "nowhere"], {"head", "lm_head"}),
        ({"0.weight"}, {"body.0", "lm_head"}),
        ("body", {"body.0", "body.2", "lm_head"}),
        (None, {"lm_head"}),
    ):
        model = Model()
        model.body._keep_in_fp32_modules_strict = parts
        model._keep_in_fp32_modules = None
        BitsandbytesPrecision("nf4", ignore_modules={"lm_head"}).convert_module(model)
        assert {name for name, kind in kinds(model).items() if kind == "Linear"} == left


def test_nothing_to_convert_is_an_error() -> None:
    plugin = BitsandbytesPrecision("nf4")
    with pytest.raises(ValueError, match=r"nf4: this Sequential has no layer to quantise.*left alone: none"):
        plugin.convert_module(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="left alone: 0: excluded by '0'"):
        BitsandbytesPrecision("nf4", ignore_modules={"0"}).convert_module(nn.Sequential(nn.Linear(4, 4)))
    assert isinstance(BitsandbytesPrecision("nf4").convert_module(nn.Linear(4, 4)), QuantizedLinear)


def test_a_frozen_model_takes_the_scaler_from_none_that_trains() -> None:
    fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision("nf4", torch.float16))
    student, teacher = Model(), Model().requires_grad_(False)
    fabric.setup(student)
    fabric.setup(teacher)
    assert str(fabric.precision_plugin.policy) == "16-mixed" and fabric.precision_plugin.scale == 65536.0
    assert student.body[1].weight.dtype is torch.float32


def test_it_is_sent_to_other_processes() -> None:
    plugin = pickle.loads(pickle.dumps(BitsandbytesPrecision("nf4", torch.float32, ignore_modules={"head"})))
    model = plugin.convert_module(Model())
    assert type(model.head) is nn.Linear and isinstance(model.lm_head, QuantizedLinear)
    assert plugin.storage(model.lm_head.weight) is None and plugin.policy.compute is torch.float32


def test_a_quantised_model_is_adopted_in_its_own_mode_only() -> None:
    model = BitsandbytesPrecision("nf4-dq", torch.float32).convert_module(Model())
    packed = model.head.weight
    plugin = BitsandbytesPrecision("nf4-dq", torch.bfloat16)
    assert plugin.convert_module(model).head.weight is packed
    assert model.head.compute_dtype is torch.bfloat16 and "taken over" in str(plugin.report)
    assert plugin.storage(packed) is None
    with pytest.raises(ValueError, match=r"body.0 is quantised in nf4-dq in blocks of 64: pass precision=\"nf4-dq\""):
        BitsandbytesPrecision("int8").convert_module(model)
    for change, how in [
        ({"block_size": 128}, 'in blocks of 128: pass replace(MODES["nf4"], block_size=128)'),
        (
            {"bnb_4bit_quant_storage": torch.bfloat16},
            'pass replace(MODES["nf4"], bnb_4bit_quant_storage=torch.bfloat16)',
        ),
    ]:
        config = replace(MODES["nf4"], **change)
        model = BitsandbytesPrecision(config).convert_module(Model())
        with pytest.raises(ValueError, match=re.escape(how)):
            BitsandbytesPrecision("nf4").convert_module(model)
        BitsandbytesPrecision(config).convert_module(model)


def test_an_adopted_model_gets_this_plugins_threshold_and_patterns() -> None:
    model = BitsandbytesPrecision("int8", torch.float32).convert_module(Model())
    config = replace(MODES["int8"], llm_int8_threshold=2.0)
    assert BitsandbytesPrecision(config).convert_module(model).head.threshold == 2.0
    with pytest.raises(ValueError, match="'heads' matches no module"):
        BitsandbytesPrecision("int8", ignore_modules={"heads"}).convert_module(model)
    trains = BitsandbytesPrecision("int8-training", torch.float32).convert_module(Model())
    config = replace(MODES["int8-training"], llm_int8_threshold=3.0)
    assert BitsandbytesPrecision(config).convert_module(trains).head.threshold == 3.0


def test_tied_heads_stay_with_their_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body, self.out = nn.Embedding(10, 64), nn.Linear(64, 64), nn.Linear(64, 10, bias=False)
            self.out.weight = self.embedding.weight

    for embeddings in (False, True):
        plugin = BitsandbytesPrecision("nf4", embeddings=embeddings)
        model = plugin.convert_module(Tied())
        assert model.out.weight is model.embedding.weight and type(model.out) is nn.Linear
        assert "tied" in str(plugin.report)


def test_the_report_says_what_was_done() -> None:
    plugin = BitsandbytesPrecision("nf4", torch.float32)
    model = Model()
    before = sum(param.nbytes for param in model.parameters())
    plugin.convert_module(model)
    assert [item.name for item in plugin.report.converted] == ["body.0", "body.2", "head"]
    assert plugin.report.bytes_before == before and plugin.report.bytes_after < 0.3 * before


BEYOND = [(mode, value) for mode in MODES for value in (math.nan, -math.inf)]
BEYOND += [(mode, 1e5) for mode in MODES if "int8" in mode]  # 4 bits hold it


@pytest.mark.parametrize(("mode", "value"), BEYOND)
def test_weights_that_cannot_be_quantised_are_named_and_nothing_was_changed(mode: str, value: float) -> None:
    model = Model()
    with torch.no_grad():
        model.head.weight[3, 5] = value
    plugin = BitsandbytesPrecision(mode)
    with pytest.raises(ValueError, match=r"head cannot be converted, and nothing was changed: its weights must be"):
        plugin.convert_module(model)
    assert set(kinds(model).values()) == {"Linear"}
    nn.init.zeros_(model.head.weight)
    plugin.convert_module(model)
    assert list(kinds(model).values()).count("Linear") == 1  # lm_head


def test_int8_takes_what_float16_rounds_to_its_largest() -> None:
    model = Model()
    nn.init.constant_(model.head.weight, 65519.0)
    BitsandbytesPrecision("int8", torch.float32).convert_module(model)
    assert torch.equal(model.head.dequantize(), torch.full((8, 64), 65504.0))


def test_what_is_no_pattern_no_module_or_quantises_nothing_is_refused_early() -> None:
    wrong: Any
    for wrong in (5, {1, "a"}, {None}, "", {"a b"}, b"lm"):
        with pytest.raises(ValueError, match=r"ignore_modules=5\): expected a set of name patterns|bad name pattern"):
            BitsandbytesPrecision("nf4", ignore_modules=wrong)
    wrong = "x"
    with pytest.raises(TypeError, match=r"convert_module expects an nn.Module, and was given a str"):
        BitsandbytesPrecision("nf4").convert_module(wrong)
    with pytest.raises(ValueError, match="embeddings=True: int8-training does not quantise embeddings"):
        BitsandbytesPrecision("int8-training", embeddings=True)
    with pytest.raises(ValueError, match="embeddings=True: int8-training does not quantise embeddings"):
        quantize(Model(), MODES["int8-training"], torch.float32, embeddings=True)


def test_refusals_name_the_argument() -> None:
    model = Model()
    model.head.weight.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match=r"skip the layers with ignore_modules=\['head'\]"):
        BitsandbytesPrecision("nf4").convert_module(model)
    BitsandbytesPrecision("nf4", ignore_modules=["head"]).convert_module(model)


# ---------------------------------------------------------------- strategies


def test_devices_without_kernels_are_refused() -> None:
    class Elsewhere(SingleDeviceStrategy):
        pass

    strategy = Elsewhere()
    strategy.device = torch.device("mps")
    reason = BitsandbytesPrecision("nf4").refuses(strategy)
    assert reason is not None and "not for 'mps'" in reason
    strategy.device = torch.device("cpu")
    for mode in MODES:
        assert BitsandbytesPrecision(mode).refuses(strategy) is None
    ddp = DDPStrategy()
    ddp.device = torch.device("cpu")
    assert BitsandbytesPrecision("nf4", torch.float16).refuses(ddp) is None
