"""Layer surgery: what is replaced, what is kept, what is left alone or refused."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from precision_core.precision.model.remap import remap_parameters
from precision_core.surgery.replace import Replacement, Surgery, replace_layers


class Double(nn.Module):
    """Twice what a linear layer gives, with parameters of its own."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight, self.bias)


class Packed(nn.Module):
    """Weights as flat bytes, frozen."""

    def __init__(self, layer: nn.Linear | nn.Embedding) -> None:
        super().__init__()
        self.shape = layer.weight.shape
        self.weight = nn.Parameter(layer.weight.detach().mul(100).to(torch.int8).flatten(), requires_grad=False)
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.view(self.shape).float() / 100, self.bias)


class MyLinear(nn.Linear):
    pass


DOUBLE = {nn.Linear: Replacement(Double)}
PACKED = {nn.Linear: Replacement(Packed, packs=True)}
X = torch.arange(4.0).view(1, 4)


def chain(count: int = 3, **kwargs: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(4, 4, **kwargs) for _ in range(count)])


def shared(module: Any, key: str = "weight") -> bool:
    return getattr(module[0], key) is getattr(module[1], key)


def state(module: nn.Module) -> dict[str, Any]:
    """What no refusal and no dry run may change: the modules, parameters and hooks as objects."""
    return {name: (id(child), type(child), *map(id, child._parameters.values())) for name, child in all_of(module)}


def all_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.named_modules(remove_duplicate=False))


def converted(surgery: Surgery) -> list[str]:
    return [name for name, _ in surgery.report.converted]


def skipped(surgery: Surgery) -> dict[str, str]:
    return dict(surgery.report.skipped)


# -------------------------------------------------------------------- what is replaced


def test_replaces_the_layers_and_says_so() -> None:
    model = nn.ModuleDict({"b": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "a": chain(2, bias=False)})
    twin = copy.deepcopy(model)
    surgery = replace_layers(model, DOUBLE, mode="double")
    assert torch.equal(model["b"](X), 2 * twin["b"](X))
    assert torch.equal(model["a"](X), 4 * twin["a"](X))
    assert surgery.module is model and surgery.report.mode == "double"
    assert surgery.report.converted == (
        ("b", "Linear -> Double"),
        ("a.0", "Linear -> Double"),
        ("a.1", "Linear -> Double"),
    )
    assert surgery.report.skipped == () and surgery.report.notes == ()
    assert list(model.state_dict()) == list(twin.state_dict())


def test_bytes() -> None:
    report = replace_layers(chain(2, bias=False), PACKED).report
    assert (report.bytes_before, report.bytes_after) == (2 * 16 * 4, 2 * 16)


def test_subclasses_are_left_alone() -> None:
    model = nn.Sequential(MyLinear(4, 4), nn.LazyLinear(4), nn.Bilinear(2, 2, 2))
    surgery = replace_layers(model, DOUBLE)
    assert [type(layer) for layer in model] == [MyLinear, nn.LazyLinear, nn.Bilinear]
    assert skipped(surgery) == {"0": "a subclass of Linear: MyLinear", "1": "a subclass of Linear: LazyLinear"}


def test_a_lazy_layer_that_was_run_is_an_ordinary_one() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    expected = model(X)
    assert converted(replace_layers(model, DOUBLE)) == ["0"]
    assert torch.equal(model(X), 2 * expected)


@pytest.mark.parametrize("plain", [False, True])
def test_attentions_output_projection_is_left_alone(plain: bool) -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    if plain:
        model[0].out_proj = nn.Linear(4, 4)
    out_proj = model[0].out_proj
    reason = skipped(replace_layers(model, DOUBLE))["0.out_proj"]
    assert model[0].out_proj is out_proj
    assert reason.endswith("MultiheadAttention uses its weight without calling its forward")
    assert reason.startswith("a subclass of Linear: NonDynamicallyQuantizableLinear; ") is not plain


def test_other_linear_layers_of_an_attention_are_replaced() -> None:
    class Attention(nn.MultiheadAttention):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.gate = nn.Linear(4, 4)

    assert converted(replace_layers(Attention(), DOUBLE)) == ["gate"]


def test_skip_sees_name_and_layer_and_its_reason_is_shown() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    skip: Callable[[str, Any], str | None] = lambda name, layer: f"{name}: {layer.out_features} rows"  # noqa: E731
    table = {nn.Linear: Replacement(Double, skip=lambda n, m: skip(n, m) if m.out_features % 4 else None)}  # type: ignore[operator]
    surgery = replace_layers(model, table)
    assert converted(surgery) == ["0"] and skipped(surgery) == {"1": "1: 3 rows"}


PATTERNS: list[tuple[Any, Any, list[str], dict[str, str]]] = [
    (None, (), ["0", "1", "10"], {}),
    (None, ["1"], ["0", "10"], {"1": "excluded by '1'"}),
    (None, "1", ["0", "10"], {"1": "excluded by '1'"}),
    (["1", "0"], ["0", "*.1"], [], {"0": "excluded by '0'", "1": "excluded by '*.1'", "10": "not included"}),
    ("1*", iter(["10"]), ["1"], {"0": "not included", "10": "excluded by '10'"}),
    ([], (), [], {"0": "not included", "1": "not included", "10": "not included"}),
]


@pytest.mark.parametrize(("include", "exclude", "names", "reasons"), PATTERNS)
def test_patterns(include: Any, exclude: Any, names: list[str], reasons: dict[str, str]) -> None:
    model = nn.ModuleDict({key: nn.Linear(4, 4) for key in ("0", "1", "10")})
    surgery = replace_layers(model, DOUBLE, include=include, exclude=exclude)
    assert converted(surgery) == names and skipped(surgery) == reasons
    assert [key for key, layer in model.items() if type(layer) is Double] == names


@pytest.mark.parametrize("which", ["include", "exclude"])
@pytest.mark.parametrize(("pattern", "error"), [("lm_hed", "matches no module"), ("a b", "bad name pattern")])
def test_patterns_that_match_nothing_are_refused(which: str, pattern: str, error: str) -> None:
    model = nn.ModuleDict({"lm_head": nn.Linear(4, 4)})
    before = state(model)
    with pytest.raises(ValueError, match=error):
        replace_layers(model, DOUBLE, **{which: [pattern]})  # type: ignore[arg-type]
    assert state(model) == before


def test_the_root_itself() -> None:
    root = nn.Linear(4, 4)
    surgery = replace_layers(root, DOUBLE)
    assert type(surgery.module) is Double and torch.equal(surgery.module(X), 2 * root(X))
    assert surgery.report.converted == (("(root)", "Linear -> Double"),)
    assert surgery.params[root.weight] is surgery.module.weight
    assert skipped(replace_layers(root, DOUBLE, exclude="*")) == {"(root)": "excluded by '*'"}


def test_odd_names_and_nested_containers() -> None:
    model = nn.ModuleDict({"list": nn.ModuleList([nn.Sequential(nn.Linear(4, 4))]), "none": nn.Identity()})
    model._modules["none"] = None
    model._modules["a.b"] = nn.Linear(4, 4)
    assert converted(replace_layers(model, DOUBLE)) == ["list.0.0", "a.b"]
    assert type(model._modules["a.b"]) is type(model["list"][0][0]) is Double  # type: ignore[index]


def test_a_layer_around_others_is_replaced_as_a_whole() -> None:
    class Wrapped(nn.Sequential):
        pass

    block, table = chain(2), {nn.Sequential: Replacement(lambda old: Wrapped(*old), takes=frozenset("01")), **DOUBLE}
    model = nn.ModuleList([block])
    surgery = replace_layers(model, table)
    assert type(model[0]) is Wrapped and type(model[0][0]) is nn.Linear
    assert converted(surgery) == ["0"] and skipped(surgery) == {"0.0": "part of 0", "0.1": "part of 0"}


# -------------------------------------------------------------------- shared and tied


def test_a_shared_layer_is_replaced_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": nn.ModuleList([layer]), "c": layer})
    assert converted(replace_layers(model, DOUBLE)) == ["a"]
    assert model["a"] is model["b"][0] is model["c"] and type(model["a"]) is Double


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"exclude": "b"}, "the same module as b.0, which is excluded by 'b'"),
        ({"exclude": "a"}, "excluded by 'a'"),
        ({"include": "a"}, "the same module as b.0, which is not included"),
    ],
)
def test_a_shared_layer_is_left_alone_when_one_of_its_names_is(kwargs: Any, reason: str) -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": nn.ModuleList([layer])})
    assert skipped(replace_layers(model, DOUBLE, **kwargs)) == {"a": reason}
    assert model["a"] is model["b"][0] is layer


@pytest.mark.parametrize("table", [DOUBLE, PACKED], ids=["double", "packed"])
def test_replaced_layers_with_one_weight_have_one_afterwards(table: Any) -> None:
    model = chain()
    model[1].weight = model[0].weight
    old, bias = model[0].weight, model[0].bias
    surgery = replace_layers(model, table)
    assert shared(model) and not shared(model, "bias") and converted(surgery) == ["0", "1", "2"]
    assert surgery.params[old] is model[0].weight and surgery.params[bias] is model[0].bias
    assert len(list(model.parameters())) == 5


def test_a_tied_layer_that_is_not_replaced_gets_the_new_weight() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "head": nn.Linear(4, 4, bias=False), "lstm": nn.LSTM(1, 1)})
    model["embedding"].weight = model["head"].weight
    old = model["head"].weight
    assert converted(replace_layers(model, DOUBLE)) == ["head"]
    assert model["embedding"].weight is model["head"].weight is not old
    assert torch.equal(model["embedding"](torch.tensor([2])), old[2:3])


def test_an_lstm_computes_with_the_new_weight() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(1, 1), "linear": nn.Linear(1, 4)})
    model["linear"].bias = model["lstm"].bias_ih_l0
    replace_layers(model, DOUBLE)
    with torch.no_grad():
        model["linear"].bias.fill_(9)
    fresh = nn.LSTM(1, 1)
    fresh.load_state_dict(model["lstm"].state_dict())
    assert torch.equal(model["lstm"](torch.ones(1, 1))[0], fresh(torch.ones(1, 1))[0])


def test_packed_weights_do_not_stand_in_for_tied_ones() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "head": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    model["embedding"].weight = model["head"].weight
    model["other"].bias = model["head"].bias
    surgery = replace_layers(model, PACKED)
    assert skipped(surgery) == {
        "head": "its weight is tied to embedding, which is not converted",
        "other": "its bias is tied to head, which is not converted",
    }
    assert model["embedding"].weight is model["head"].weight and model["head"].bias is model["other"].bias


@pytest.mark.parametrize("packs", [(True, True), (True, False), (False, True)])
def test_two_replacements_of_one_tied_weight(packs: tuple[bool, bool]) -> None:
    model = nn.ModuleList([nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)])
    model[0].weight = model[1].weight
    make = {True: Packed, False: Double}
    for layer in model:
        layer.bias = None  # type: ignore[assignment]
    table = {
        nn.Embedding: Replacement(make[packs[0]], packs=packs[0]),  # type: ignore[arg-type]
        nn.Linear: Replacement(make[packs[1]], packs=packs[1]),  # type: ignore[arg-type]
    }
    surgery = replace_layers(model, table)
    assert converted(surgery) == [str(index) for index in (0, 1) if not packs[index]]
    assert shared(model) and model[0].weight.dtype is torch.float32
    assert all("its weight is tied to" in reason for reason in skipped(surgery).values())


@pytest.mark.parametrize(
    ("ties", "names"),
    [
        ([("0.weight", "0.bias")], ["0", "1"]),  # a tie inside of one layer is that layer's
        ([("0.weight", "1.bias")], []),  # a weight and a bias may be packed in different ways
        ([("0.weight", "1.weight"), ("0.bias", "1.bias")], ["0", "1"]),
    ],
)
def test_ties_between_layers_that_pack(ties: list[tuple[str, str]], names: list[str]) -> None:
    class Bytes(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            for name, param in layer.named_parameters(remove_duplicate=False):
                setattr(self, name, nn.Parameter(param.detach().to(torch.int8), requires_grad=False))

    model = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
    for first, second in ties:
        setattr(model.get_submodule(second[0]), second[2:], model.get_parameter(first))
    assert converted(replace_layers(model, {nn.LayerNorm: Replacement(Bytes, packs=True)})) == names
    for first, second in ties:
        assert model.get_parameter(first) is model.get_parameter(second)


@pytest.mark.parametrize("first", [0, 1])
def test_a_layer_that_keeps_the_old_parameter_keeps_its_ties(first: int) -> None:
    class Keeps(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = layer.weight, layer.bias

    model = nn.ModuleList([nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
    model[2].weight = model[0].weight = model[1].weight
    old = model[1].weight
    made = iter([Keeps, Double] if first == 0 else [Double, Keeps])
    surgery = replace_layers(model, {nn.Linear: Replacement(lambda layer: next(made)(layer))})  # type: ignore[arg-type]
    assert model[0].weight is model[1].weight is model[2].weight
    assert (model[0].weight is old) is (first == 0)
    assert (old in surgery.params) is (first == 1)


@pytest.mark.parametrize("make", [Packed, lambda layer: Double(layer).bfloat16()], ids=["packed", "bfloat16"])
@pytest.mark.parametrize("key", ["embedding", "linear"])
def test_a_new_weight_that_cannot_stand_in_is_an_error(make: Any, key: str) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "head": nn.Linear(4, 4), "linear": nn.Linear(4, 4)})
    model[key].weight = model["head"].weight
    made = iter([make, Double])
    with pytest.raises(ValueError, match=r"its weight is tied.*packs=True") as info:
        replace_layers(model, {nn.Linear: Replacement(lambda layer: next(made)(layer))})
    assert str(info.value).startswith("head:" if key == "embedding" else "linear:")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["linear", "packed", "embedding"])), min_size=1, max_size=6)
)
def test_weights_that_were_one_are_one_afterwards(layers: list[tuple[int, str]]) -> None:
    weights = [nn.Parameter(torch.full((4, 4), float(index))) for index in range(4)]
    makes: dict[str, Callable[[], Any]] = {
        "linear": lambda: nn.Linear(4, 4, bias=False),
        "packed": lambda: nn.Bilinear(1, 1, 1, bias=False),
        "embedding": lambda: nn.Embedding(4, 4),
    }
    model = nn.ModuleList()
    for index, kind in layers:
        model.append(makes[kind]())
        model[-1].weight = weights[index]
    table = {**DOUBLE, nn.Bilinear: Replacement(Packed, packs=True)}  # type: ignore[arg-type]
    foreseen = replace_layers(model, table, dry_run=True)
    surgery = replace_layers(model, table)
    assert converted(foreseen) == converted(surgery) and skipped(foreseen) == skipped(surgery)
    for mine, (index, _) in zip(model, layers, strict=True):
        for other, (other_index, _) in zip(model, layers, strict=True):
            assert (mine.weight is other.weight) is (index == other_index)
    for layer, (index, kind) in zip(model, layers, strict=True):
        if kind != "packed":
            assert torch.equal(layer.weight, weights[index])


# -------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("training", [True, False])
def test_training_flag(training: bool) -> None:
    model = chain(1).train(training)
    replace_layers(model, {nn.Linear: Replacement(lambda old: _with(Double(old), drop=nn.Dropout()))})  # type: ignore[arg-type]
    assert model[0].training is model[0].drop.training is training


def _with(module: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("table", [DOUBLE, PACKED], ids=["double", "packed"])
def test_requires_grad(weight: bool, bias: bool, table: Any) -> None:
    model = chain(1)
    model[0].weight.requires_grad_(weight)
    model[0].bias.requires_grad_(bias)
    replace_layers(model, table)
    assert model[0].weight.requires_grad is (weight and table is DOUBLE)
    assert model[0].bias.requires_grad is bias


@pytest.mark.parametrize(("was", "made"), [(True, False), (False, True)])
def test_floating_storage_of_packed_weights_is_frozen_when_either_is(was: bool, made: bool) -> None:
    model = chain(1, bias=False).requires_grad_(was)
    flat = lambda _: _with(nn.Module(), weight=nn.Parameter(torch.zeros(8), requires_grad=made))  # noqa: E731
    replace_layers(model, {nn.Linear: Replacement(flat, packs=True)})
    assert not model[0].weight.requires_grad


def test_attributes_of_layers_and_of_parameters() -> None:
    model = chain(1)
    layer = _with(model[0], is_head=True, shape=(9,))
    layer.rows = (lambda self: self.weight.shape[0]).__get__(layer)
    layer.weight.no_decay = True
    replace_layers(model, PACKED)
    new: Any = model[0]
    assert new.is_head and new.in_features == 4 and new.shape == (4, 4) and new.weight.no_decay
    assert new.rows() == 16 and new is not layer


def test_hooks_move() -> None:
    model, seen = chain(1), []
    handle = model[0].register_forward_hook(lambda module, args, out: seen.append(type(module)))
    replace_layers(model, DOUBLE)
    model(X)
    handle.remove()
    model(X)
    assert seen == [Double]


def test_a_layer_with_a_method_of_its_own_is_left_alone() -> None:
    model = chain()
    model[0].forward = lambda x: x
    model[1].extra_repr = lambda: "mine"
    model[2].compile(backend="eager")
    surgery = replace_layers(model, DOUBLE)
    assert surgery.report.converted == () and model[0](X) is X
    assert skipped(surgery) == {
        "0": "its own forward would be lost",
        "1": "its own extra_repr would be lost",
        "2": "compiled already: convert the model before layer.compile()",
    }


def test_a_layer_that_is_changed_in_place_and_returned() -> None:
    def in_place(layer: Any) -> nn.Module:
        layer.weight = nn.Parameter(layer.weight.detach() * 2)
        layer.drop = nn.Dropout().eval()
        return layer

    model, seen = chain(1), []
    layer, old = model[0], model[0].weight.requires_grad_(False)
    layer.register_forward_hook(lambda *_: seen.append(1))
    surgery = replace_layers(model, {nn.Linear: Replacement(in_place)})
    assert model[0] is layer and torch.equal(layer.weight, old * 2) and not layer.weight.requires_grad
    assert surgery.params[old] is layer.weight and layer.training and not layer.drop.training
    model(X)
    assert seen == [1]


# -------------------------------------------------------------------- what is refused

SPOIL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "parametrize": (parametrizations.orthogonal, "a parametrisation of weight"),
    "weight_norm": (weight_norm, "WeightNorm .*remove_weight_norm"),
    "spectral_norm": (spectral_norm, "SpectralNorm .*remove_spectral_norm"),
    "prune": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "L1Unstructured .*prune.remove"),
    "hook": (lambda layer: layer.weight.register_hook(lambda grad: grad), "a hook on the gradient of weight"),
    "accumulated": (
        lambda layer: layer.bias.register_post_accumulate_grad_hook(lambda param: None),
        "a hook on the gradient of bias",
    ),
    "grad": (lambda layer: layer(X).sum().backward(), "a gradient of weight"),
    "parameter": (lambda layer: _with(layer, gain=nn.Parameter(torch.ones(1))), "gain, which Linear layers do not"),
    "buffer": (lambda layer: layer.register_buffer("mask", torch.ones(1)), "mask, which"),
    "child": (lambda layer: _with(layer, lora=nn.Identity()), "lora, which"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("kind", SPOIL)
def test_what_would_be_lost_is_refused_before_anything_changes(kind: str, dry_run: bool) -> None:
    model = chain(12)
    spoil, message = SPOIL[kind]
    for layer in model[1:]:
        spoil(layer)
    before = state(model)
    with pytest.raises(ValueError, match=message) as info:
        replace_layers(model, DOUBLE, dry_run=dry_run)
    assert state(model) == before
    lines = str(info.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:11]] == [str(index) for index in range(1, 11)]
    assert lines[11] == "  ... and 1 more" and "exclude=['1', '2', " in lines[12]
    others = [str(index) for index in range(1, 12)]
    assert converted(replace_layers(model, DOUBLE, exclude=others)) == ["0"]


@pytest.mark.parametrize("dry_run", [False, True])
def test_gradients_and_hooks_stay_on_parameters_that_are_kept(dry_run: bool) -> None:
    def make(layer: nn.Module) -> nn.Module:
        new = nn.Linear(4, 4, device="meta")
        new.weight, new.bias = layer.weight, nn.Parameter(layer.bias.detach())  # type: ignore[assignment,operator]
        return new

    table = {nn.Linear: Replacement(make, keeps=lambda layer, param: param is layer.weight)}
    model = chain(2)
    weight = model[0].weight
    model(X).sum().backward()
    weight.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match="a gradient of bias"):
        replace_layers(model, table, dry_run=dry_run)
    for layer in model:
        layer.bias.grad = None
    gradient = weight.grad
    replace_layers(model, table, dry_run=dry_run)
    assert model[0].weight is weight and weight.grad is gradient and len(weight._backward_hooks) == 1


def test_a_parametrised_subclass_is_a_subclass() -> None:
    model = nn.Sequential(parametrizations.orthogonal(MyLinear(4, 4)))
    assert skipped(replace_layers(model, DOUBLE)) == {"0": "a subclass of Linear: MyLinear"}


def test_takes_says_what_else_the_new_layer_has() -> None:
    model = chain(1)
    model[0].register_buffer("mask", torch.ones(4))
    table = {
        nn.Linear: Replacement(
            lambda old: _with(Double(old), mask=nn.Buffer(old.mask)),  # type: ignore[arg-type]
            takes=frozenset({"weight", "bias", "mask"}),
        )
    }
    assert converted(replace_layers(model, table)) == ["0"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda layer: 1 / 0, RuntimeError, r"1 could not be converted \(layers converted before it: 1\): division"),
        (lambda layer: layer.weight, TypeError, "1: make returned a Parameter, not a module"),
        (lambda layer: nn.Identity(), ValueError, "1: the new Identity has no weight, bias"),
    ],
)
def test_a_make_that_fails(make: Any, error: type[Exception], message: str) -> None:
    model = chain()
    made = iter([Double, make])
    with pytest.raises(error, match=message) as info:
        replace_layers(model, {nn.Linear: Replacement(lambda layer: next(made)(layer))})
    assert [type(layer) for layer in model] == [Double, nn.Linear, nn.Linear]
    assert (type(info.value.__cause__) is ZeroDivisionError) is (error is RuntimeError)


def test_a_weight_may_become_a_buffer() -> None:
    model = chain(1, bias=False)
    old = model[0].weight
    table = {nn.Linear: Replacement(lambda layer: _with(nn.Module(), weight=nn.Buffer(layer.weight.data)), packs=True)}
    surgery = replace_layers(model, table)  # type: ignore[arg-type]
    assert converted(surgery) == ["0"] and old not in surgery.params


# -------------------------------------------------------------------- how


def test_a_dry_run_changes_nothing_and_foresees_all() -> None:
    def model() -> nn.ModuleDict:
        parts = {"encoder": nn.TransformerEncoderLayer(4, 2), "head": nn.Linear(4, 4), "out": nn.Linear(4, 4)}
        built = nn.ModuleDict({**parts, "embedding": nn.Embedding(4, 4)})
        built["head"].weight = built["embedding"].weight
        return built

    dry = model()
    before = state(dry)
    never = Replacement(lambda layer: 1 / 0, packs=True)  # type: ignore[arg-type,return-value]
    foreseen = replace_layers(dry, {nn.Linear: never}, exclude="out", dry_run=True)
    assert state(dry) == before and dry["encoder"].activation_relu_or_gelu == 1
    assert len(foreseen.params) == 0 and foreseen.report.bytes_before == foreseen.report.bytes_after
    done = replace_layers(model(), PACKED, exclude="out")
    assert converted(foreseen) == converted(done) == ["encoder.linear1", "encoder.linear2"]
    assert skipped(foreseen) == skipped(done) and set(skipped(done)) == {"encoder.self_attn.out_proj", "head", "out"}
    assert foreseen.report.notes == done.report.notes != ()


@pytest.mark.parametrize("table", [DOUBLE, PACKED], ids=["double", "packed"])
def test_old_weights_are_free_when_the_next_layer_is_made(table: Any) -> None:
    model = chain(4)
    model[3].weight = model[0].weight  # needed until the last is made
    weights = [weakref.ref(layer.weight) for layer in model]
    layers = [weakref.ref(layer) for layer in model]
    alive: list[tuple[list[bool], list[bool]]] = []

    def make(layer: nn.Module) -> nn.Module:
        alive.append(([weight() is not None for weight in weights], [layer() is not None for layer in layers]))
        return table[nn.Linear].make(layer)

    replace_layers(model, {nn.Linear: Replacement(make, packs=table is PACKED)})
    assert alive == [
        ([True, True, True, True], [True, True, True, True]),
        ([True, True, True, True], [False, True, True, True]),
        ([True, False, True, True], [False, False, True, True]),
        ([True, False, False, True], [False, False, False, True]),
    ]
    assert [weight() for weight in weights] == [None] * 4


def test_make_can_free_the_weight_itself() -> None:
    model = chain(1, bias=False)
    old = weakref.ref(model[0].weight)

    def make(layer: Any) -> nn.Module:
        new = Double(layer)
        layer.weight = None
        assert old() is None
        return new

    model[0].weight.requires_grad_(False)
    replace_layers(model, {nn.Linear: Replacement(make)})
    assert not model[0].weight.requires_grad


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.ModuleList([nn.Embedding(4, 4), *chain(2)])
    model[0].weight = model[1].weight
    assert converted(replace_layers(model, DOUBLE)) == ["1", "2"]
    assert shared(model) and all(param.is_meta for param in model.parameters())


def test_an_optimizer_made_before_trains_the_new_layers() -> None:
    model = chain(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    remap_parameters(optimizer, replace_layers(model, DOUBLE).params)
    twin = copy.deepcopy(model)
    for module, steps in ((model, optimizer), (twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9))):
        for _ in range(3):
            steps.zero_grad()
            module(X).sum().backward()
            steps.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert not torch.equal(model[0].weight, chain(2)[0].weight)


# -------------------------------------------------------------------- torch's fast paths


def encoder_layer(**kwargs: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, **kwargs)


def by_hand(layer: Any, x: Tensor, padding: Tensor | None = None) -> Tensor:
    """A post-norm encoder layer whose linear layers give twice their output; slow in every step."""
    mask = None if padding is None else torch.zeros(padding.shape).masked_fill(padding, float("-inf"))
    query, key, value = F.linear(x, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias).chunk(3, -1)
    query, key, value = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in (query, key, value))
    scores = query @ key.transpose(-1, -2) / 2**0.5
    scores = scores if mask is None else scores + mask[:, None, None, :]
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    out_proj = layer.self_attn.out_proj
    x = layer.norm1(x + F.linear(mixed, out_proj.weight, out_proj.bias))
    inner = 2 * F.linear(x, layer.linear1.weight, layer.linear1.bias)
    return layer.norm2(x + 2 * F.linear(layer.activation(inner), layer.linear2.weight, layer.linear2.bias))


SOURCE = torch.linspace(-1, 1, 24).view(2, 3, 4)
PADDING = torch.tensor([[False, False, True], [False, False, False]])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_layer_in_inference_calls_the_new_layers(activation: str) -> None:
    layer = encoder_layer(activation=activation).eval()
    surgery = replace_layers(layer, DOUBLE)
    with torch.no_grad():
        torch.testing.assert_close(layer(SOURCE), by_hand(layer, SOURCE))
    (note,) = surgery.report.notes
    assert note.startswith("torch's fast path for inference is off in (root)")


def test_a_whole_encoder_in_inference_calls_the_new_layers() -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    reference = copy.deepcopy(encoder)
    surgery = replace_layers(encoder, DOUBLE, exclude="layers.0.linear1")
    assert "off in (root), layers.0, layers.1:" in surgery.report.notes[0]
    with torch.no_grad():
        encoder.layers[0].linear1.weight.mul_(2)
        encoder.layers[0].linear1.bias.mul_(2)
        output = encoder(SOURCE, src_key_padding_mask=PADDING)
        expected = SOURCE
        for layer in reference.layers:
            expected = by_hand(layer, expected, PADDING)
    torch.testing.assert_close(output[~PADDING], expected[~PADDING])


def test_the_fast_path_stays_where_nothing_is_replaced() -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2, norm=nn.LayerNorm(4))
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(4, 4), "own": encoder_layer(activation=F.silu)})
    table = {**DOUBLE, nn.LayerNorm: Replacement(copy.deepcopy)}
    surgery = replace_layers(model, table, exclude=["encoder.layers.*"])
    assert surgery.report.notes == () and converted(surgery) == [
        "encoder.norm",
        "head",
        *[f"own.{name}" for name in ("linear1", "linear2", "norm1", "norm2")],
    ]
    assert encoder.use_nested_tensor and all(layer.activation_relu_or_gelu == 1 for layer in encoder.layers)


def test_only_the_layers_with_new_parts_lose_the_fast_path() -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2)
    replace_layers(encoder, DOUBLE, include="layers.1")
    assert [layer.activation_relu_or_gelu for layer in encoder.layers] == [1, 0]
    assert encoder.use_nested_tensor is False


def test_an_encoder_layer_that_is_replaced_itself() -> None:
    gates = []

    def make(old: Any) -> nn.Module:
        gates.append(old.activation_relu_or_gelu)
        return copy.deepcopy(old)

    encoder = nn.TransformerEncoder(encoder_layer(), 1)
    takes = frozenset(name for name, _ in encoder.layers[0].named_children())
    report = replace_layers(encoder, {nn.TransformerEncoderLayer: Replacement(make, takes=takes)}).report
    assert gates == [1] and encoder.use_nested_tensor is False
    assert "off in (root):" in report.notes[0]
