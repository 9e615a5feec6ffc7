"""Conversion: what is converted and what not, what it keeps, and the way back; by the engine that runs anywhere."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import SGD

from precision_core import Fabric
from precision_te import TransformerEnginePrecision, restore
from precision_te.reference.layers import ReferenceLinear


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU()) for _ in range(3))
        self.odd = nn.Linear(32, 30)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.odd(x).sum(-1, keepdim=True)


def plugin(**options: Any) -> TransformerEnginePrecision:
    return TransformerEnginePrecision("bf16-mixed", engine="reference", **options)


def converted(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, ReferenceLinear)]


BLOCKS = ["blocks.0.1", "blocks.1.1", "blocks.2.1"]


# ---------------------------------------------------------------- what


def test_linear_layers_are_converted_and_the_report_says_so() -> None:
    te, model = plugin(), Model()
    before = {name: param.clone() for name, param in model.named_parameters()}
    assert te.convert_module(model) is model
    assert converted(model) == [*BLOCKS, "head"]
    report = te.report
    assert [item.name for item in report.converted] == converted(model)
    assert {item.detail for item in report.converted} == {"Linear -> ReferenceLinear"}
    ((name, reason),) = report.skipped
    assert name == "odd" and "30" in reason and "16" in reason
    assert '4 of 5 linear layers compute in recipe "delayed"' in report.notes
    assert any("norms stay torch's" in note for note in report.notes)
    small = ", ".join(converted(model))
    assert f"fewer than 2**20 weights, perhaps too small to win: {small}" in report.notes
    assert report.bytes_before == report.bytes_after
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"exclude": {"head"}}, ["head"]),
        ({"exclude": "blocks.0"}, ["blocks.0.1"]),
        ({"exclude": ["blocks", "head"], "replace_layers": True}, None),
        ({"keep_first": 1}, ["blocks.0.1"]),
        ({"keep_last": 1}, ["head"]),
        ({"keep_first": 2, "keep_last": 1}, ["blocks.0.1", "blocks.1.1", "head"]),
        ({"keep_first": 2, "exclude": "blocks.0"}, ["blocks.0.1", "blocks.1.1", "blocks.2.1"]),
        ({"keep_last": 9}, None),
        ({"recipe": "mxfp8"}, []),
    ],
    ids=str,
)
def test_what_is_left_alone(options: dict[str, Any], left: list[str] | None) -> None:
    te, model = plugin(**options), Model()
    if left is None:
        with pytest.raises(ValueError, match=r"has no layer to convert. Linear are; left alone: .*odd: "):
            te.convert_module(model)
        assert converted(model) == []
        return
    te.convert_module(model)
    assert converted(model) == [name for name in (*BLOCKS, "head") if name not in left]
    assert {item.name for item in te.report.skipped} == {*left, "odd"}


def test_the_reason_of_the_rule_is_in_the_report() -> None:
    te = plugin(keep_first=1, exclude="head")
    te.convert_module(Model())
    reasons = dict(te.report.skipped)
    assert reasons["blocks.0.1"] == "among the first 1 linear layers, which stay"
    assert reasons["head"] == "excluded by 'head'"


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    te, model = plugin(exclude="heads"), Model()
    with pytest.raises(ValueError, match=r"'heads' matches no module of this model; did you mean"):
        te.convert_module(model)
    assert converted(model) == []


def test_modules_that_are_exceptions_of_the_base_mode_stay_in_it() -> None:
    te, model = TransformerEnginePrecision("bf16-mixed; head: 32-true", engine="reference"), Model()
    te.convert_module(model)
    assert converted(model) == BLOCKS and te.mode == "fp8-reference; head: 32-true"
    seen = []
    model.head.register_forward_hook(lambda layer, args, output: seen.append(output.dtype))
    with te.forward_context():
        model(torch.zeros(8, 4, dtype=torch.long))
    assert seen == [torch.float32]
    model = Model()
    TransformerEnginePrecision("bf16-mixed; blocks.0: 32-true", engine="reference").convert_module(model)
    assert converted(model) == [*BLOCKS[1:], "head"]  # what is inside of it, too


@pytest.mark.parametrize("make", [nn.Identity, lambda: nn.Conv2d(3, 3, 3), lambda: nn.Linear(7, 7), nn.ReLU])
def test_a_model_without_a_layer_to_convert_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="has no layer to convert"):
        plugin().convert_module(make())


def test_what_torch_computes_in_another_way_stays() -> None:
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict({"mine": Mine(32, 32), "attention": nn.MultiheadAttention(32, 2), "plain": nn.Linear(32, 32)})
    te = plugin()
    te.convert_module(model)
    assert converted(model) == ["plain"]
    assert "a subclass of Linear: Mine" in dict(te.report.skipped)["mine"]


def test_what_would_be_lost_is_refused_before_anything_changes() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    model = Model()
    parametrize.register_parametrization(model.blocks[1][1], "weight", Twice())  # type: ignore[index]
    with pytest.raises(ValueError, match=r"blocks.1.1: a parametrisation of weight"):
        plugin().convert_module(model)
    assert converted(model) == []


def test_work_is_linear_in_the_number_of_layers() -> None:
    """Counted in calls, which a busy machine does not change; `benchmarks/bench_te_convert.py` has the time."""

    def calls_a_layer(count: int) -> float:
        with torch.device("meta"):
            layers = [nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)) for _ in range(count)]
        te, model, calls = plugin(keep_first=1, exclude={"1.1"}), nn.Sequential(*layers), 0

        def count_call(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(count_call)
        try:
            te.convert_module(model)
        finally:
            sys.setprofile(before)
        assert len(converted(model)) == count - 2
        return calls / count

    assert calls_a_layer(400) == pytest.approx(calls_a_layer(100), rel=0.02)


class Conv1D(nn.Module):
    """As that of transformers: x W + b, and no class of torch's."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))


def test_linear_layers_that_are_no_class_of_torchs_are_counted_and_named() -> None:
    te = plugin()
    model = nn.ModuleDict({"fc": Conv1D(64, 32), "head": nn.Linear(32, 64), "ln": nn.LayerNorm((4, 32))})
    model["wte"] = nn.Embedding(64, 32)
    te.convert_module(model)
    assert te.report.notes[0] == '1 of 2 linear layers compute in recipe "delayed"'
    assert te.report.skipped == (("fc", "a Conv1D, which is no Linear of torch's"),)
    with pytest.raises(ValueError, match="left alone: fc: a Conv1D"):
        plugin().convert_module(nn.ModuleDict({"fc": Conv1D(64, 32)}))


# ---------------------------------------------------------------- what it keeps


def test_parameters_stay_the_same_objects_tied_ones_too() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    ids = [id(param) for param in model.parameters()]
    plugin().convert_module(model)
    assert [id(param) for param in model.parameters()] == ids
    assert model.head.weight is model.embedding.weight
    assert [id(param) for param in optimizer.param_groups[0]["params"]] == ids


def test_flags_hooks_and_attributes_are_kept() -> None:
    model = Model()
    layer: Any = model.blocks[0][1]  # type: ignore[index]
    layer.weight.requires_grad_(False)
    layer.eval().note = "mine"
    calls = []
    handle = layer.register_forward_hook(lambda module, args, output: calls.append(module))
    te = plugin()
    te.convert_module(model)
    new: Any = model.blocks[0][1]  # type: ignore[index]
    assert isinstance(new, ReferenceLinear) and not new.training and new.note == "mine"
    assert not new.weight.requires_grad and new.bias.requires_grad and model.blocks[1][1].training  # type: ignore[index]
    with te.forward_context():
        model(torch.zeros(8, 4, dtype=torch.long))
    assert calls == [new]
    handle.remove()
    assert not new._forward_hooks


def test_a_frozen_model_and_one_on_meta_are_converted() -> None:
    frozen = Model().requires_grad_(False)
    plugin().convert_module(frozen)
    assert len(converted(frozen)) == 4 and not any(param.requires_grad for param in frozen.parameters())
    with torch.device("meta"):
        model = Model()
    plugin().convert_module(model)
    assert len(converted(model)) == 4 and all(param.is_meta for param in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(Model().state_dict())  # strict
    assert len(converted(model)) == 4


def test_the_root_itself_is_replaced() -> None:
    fabric = Fabric(accelerator="cpu", precision="fp8-current-reference")
    layer = nn.Linear(32, 32)
    optimizer = SGD(layer.parameters(), lr=0.1)
    new, _ = fabric.setup(layer, optimizer)
    assert isinstance(new, ReferenceLinear) and new.weight is layer.weight
    assert new(torch.randn(16, 32)).dtype is torch.float32
    back = restore(plugin().convert_module(nn.Linear(32, 32)))
    assert type(back) is nn.Linear


def test_a_copy_and_a_pickle_of_a_converted_model_are_whole() -> None:
    te, model = plugin(recipe="current"), Model()
    te.convert_module(model)
    ids = torch.randint(64, (8, 4))
    with te.forward_context():
        expected = model(ids)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert converted(twin) == converted(model) and twin.head.weight is twin.embedding.weight
            assert torch.equal(twin(ids), expected)


# ---------------------------------------------------------------- again


def test_a_converted_model_is_taken_as_it_is_with_what_was_added() -> None:
    te, model = plugin(), Model()
    te.convert_module(model)
    layers = [model.get_submodule(name) for name in converted(model)]
    other = plugin()
    model.add_module("adapter", nn.Linear(32, 32))
    other.convert_module(model)
    assert converted(model) == [*BLOCKS, "head", "adapter"]
    assert all(any(layer is mine for mine in model.modules()) for layer in layers)
    assert any("4 layers were the engine's before" in note for note in other.report.notes)
    again = plugin()
    again.convert_module(model)
    assert again.report.converted == () and "5 of 6 linear layers" in again.report.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "head"}, r"head: excluded by 'head', and"),
        ({"exclude": "blocks.1", "replace_layers": False}, r"blocks.1.1: excluded by 'blocks.1', and"),
        ({"precision": "bf16-mixed; blocks: 32-true"}, r"blocks.0.1: excluded by 'blocks', and"),
        ({"keep_first": 1}, r"blocks.0.1: among the first 1 linear layers, which stay, and"),
        ({"keep_last": 1}, r"narrow: among the last 1 linear layers, which stay, and"),
        ({"recipe": "mxfp8"}, r"narrow: out_features=48 is no multiple of 32, which mxfp8 needs, and"),
    ],
    ids=str,
)
def test_a_second_set_up_by_whose_rules_converted_layers_stay_is_refused(options: dict[str, Any], message: str) -> None:
    def make() -> TransformerEnginePrecision:
        return TransformerEnginePrecision(**{"precision": "bf16-mixed", "engine": "reference"} | options)

    model, fresh = Model(), Model()
    for each in (model, fresh):
        each.add_module("narrow", nn.Linear(32, 48))
    plugin().convert_module(model)
    before = converted(model)
    with pytest.raises(ValueError, match=rf"{message} it is .*put torch's layers back first, precision_te.restore"):
        make().convert_module(model)
    assert converted(model) == before
    if options.get("replace_layers", True):
        make().convert_module(restore(model))
        make().convert_module(fresh)
        assert converted(model) == converted(fresh) != before
        make().convert_module(model)  # the same rules again are kept
        assert converted(model) == converted(fresh)


def test_replace_layers_false_keeps_the_engines_layers_and_asks_for_one() -> None:
    model = Model()
    with pytest.raises(ValueError, match="replace_layers=False keeps the engine's layers, and this Model has none"):
        plugin(replace_layers=False).convert_module(model)
    model.blocks[0][1] = ReferenceLinear(nn.Parameter(torch.randn(32, 32)), None)  # type: ignore[index,operator]
    te = plugin(replace_layers=False)
    te.convert_module(model)
    assert converted(model) == ["blocks.0.1"] and te.report.converted == ()


# ---------------------------------------------------------------- back


def test_converting_back_gives_torchs_layers_with_equal_values() -> None:
    te, model = plugin(), Model()
    values, keys = {name: value.clone() for name, value in model.state_dict().items()}, list(model.state_dict())
    text = str(model)
    model.blocks[0][1].note = "mine"  # type: ignore[index,union-attr]
    te.convert_module(model)
    with te.forward_context():
        model(torch.zeros(8, 4, dtype=torch.long))  # there is an amax history now
    before = [id(param) for param in model.parameters()]
    assert restore(model) is model
    assert str(model) == text and list(model.state_dict()) == keys and converted(model) == []
    assert [id(param) for param in model.parameters()] == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    layer: Any = model.blocks[0][1]  # type: ignore[index]
    assert type(layer) is nn.Linear and layer.note == "mine"
    assert vars(layer).keys() - {"note"} == vars(nn.Linear(1, 1)).keys()
    ids = torch.randint(64, (8, 4))
    assert torch.equal(model(ids), copy.deepcopy(model)(ids))
    with pytest.raises(ValueError, match="this Model has no layer that precision-te converted"):
        restore(model)


def test_gradients_and_hooks_on_them_stay_both_ways() -> None:
    te, model = plugin(), Model()
    ids = torch.randint(64, (8, 4))
    model(ids).sum().backward()
    calls = []
    model.odd.weight.register_hook(lambda grad: calls.append("odd"))
    layer: Any = model.blocks[0][1]  # type: ignore[index]
    layer.weight.register_post_accumulate_grad_hook(lambda param: calls.append("block"))
    before = [param.grad for param in model.parameters()]
    for change in (te.convert_module, restore):
        change(model)
        assert all(param.grad is grad for param, grad in zip(model.parameters(), before, strict=True))
    te.convert_module(model)
    with te.forward_context():
        te.convert_output(model(ids)).sum().backward()  # accumulates: the step may come after it is put back
    twice = [param.grad.clone() for param in model.parameters() if param.grad is not None]
    restore(model)
    assert all(torch.equal(grad, param.grad) for grad, param in zip(twice, model.parameters(), strict=True))
    assert sorted(calls) == ["block", "odd"]


def test_a_model_that_was_put_back_can_be_converted_anew() -> None:
    model = Model()
    for recipe in ("delayed", "mxfp8", "nvfp4"):
        plugin(recipe=recipe).convert_module(model)
        assert len(converted(model)) == 4
        restore(model)
