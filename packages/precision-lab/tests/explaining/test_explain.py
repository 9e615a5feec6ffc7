"""A step that goes wrong is run once more: the operation, its module and line, the class of the cause, the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import precision_lab
from precision_lab.explaining.explanation import Explanation


class HandNorm(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        squares = (x * x).sum(-1, keepdim=True)
        return x / (squares.sqrt() + self.eps) * self.weight


class Model(nn.Module):
    def __init__(self, eps: float = 1e-3, then: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.norm = HandNorm(eps)
        self.head = nn.Linear(8, 3)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        x = self.then(self.first(x))
        x = self.second(x)
        return self.head(self.norm(x))


def explained(
    model: nn.Module, dtype: torch.dtype | None = None, x: Tensor | None = None, **options: Any
) -> Explanation:
    torch.manual_seed(1)
    x = torch.randn(4, 8) if x is None else x
    labels = torch.tensor([0, 1, 2, 0])
    context = {"cpu": dtype} if dtype is not None else {}
    options.setdefault("loss", lambda output: functional.cross_entropy(output.float(), labels))
    return precision_lab.explain(model, (x,), context=context, **options)


def made(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options)


def text_of(found: Explanation) -> str:
    return found.line.text if found.line is not None else ""


def test_an_overflow_in_a_product_has_operation_module_line_and_a_remedy() -> None:
    model = made()
    with torch.no_grad():
        model.second.weight.mul_(1e5)
        model.second.weight.clamp_(-6e4, 6e4)
        model.first.weight.mul_(30)
    found = explained(model, torch.float16)
    assert (found.kind, found.phase, found.operation) == ("overflow in a product", "forward", "addmm")
    assert (found.module, text_of(found)) == ("second", "x = self.second(x)")
    assert found.output is not None and found.output.infs > 0 and found.output.dtype == "float16"
    assert all(each.finite for each in found.operands)
    assert found.remedy is not None and found.remedy.ours == '"second: 32-true"'
    assert explained(model).kind == "nothing"


def test_a_weight_beyond_the_format_is_a_cast() -> None:
    model = made()
    with torch.no_grad():
        model.second.weight[0, 0] = 7e4
    found = explained(model, torch.float16)
    assert (found.kind, found.operation, found.module) == ("overflow in a cast", "_to_copy", "second")
    assert "7e+04" in found.what and found.remedy is not None and '"second: 32-true' in found.remedy.ours


@pytest.mark.parametrize(
    "then, kind, operation",
    [
        (lambda x: torch.exp(x * 200), "overflow in exp", "exp"),
        (lambda x: torch.log(torch.relu(x)), "log of zero", "log"),
        (lambda x: x / torch.relu(x), "division by zero", "div"),
        (lambda x: torch.softmax(x.masked_fill(x < 9, -torch.inf), -1), "softmax of -inf", "_softmax"),
        (lambda x: torch.sqrt(-x.abs()), "root of a negative number", "sqrt"),
    ],
    ids=["exp", "log", "division", "softmax", "root"],
)
def test_what_no_format_mends_is_mended_at_its_line(
    then: Callable[[Tensor], Tensor], kind: str, operation: str
) -> None:
    found = explained(made(then=then))
    assert (found.kind, found.operation, found.module) == (kind, operation, "")
    assert text_of(found).startswith("(lambda x: torch.") or text_of(found).startswith("(lambda x: x /")
    assert found.remedy is not None and found.remedy.kind == "code"


def test_a_square_overflows_in_half_weights() -> None:
    model = made().half()
    with torch.no_grad():
        model.second.weight.mul_(2000)
    labels = torch.tensor([0, 1, 2, 0])
    torch.manual_seed(1)
    x = torch.randn(4, 8).half()
    found = precision_lab.explain(model, x, loss=lambda output: functional.cross_entropy(output.float(), labels))
    assert (found.kind, found.operation, found.module) == ("overflow in a square", "mul", "norm")
    assert text_of(found) == "squares = (x * x).sum(-1, keepdim=True)"
    assert found.remedy is not None and found.remedy.ours == '"norm: 32-true"'


def test_the_slope_of_a_root_at_zero_is_found_in_backward() -> None:
    model = made(eps=0.1)
    with torch.no_grad():
        model.second.weight.zero_()
        model.second.bias.zero_()
    found = explained(model)
    assert (found.kind, found.phase, found.forward, found.module) == ("infinite slope", "backward", "sqrt", "norm")
    assert text_of(found) == "return x / (squares.sqrt() + self.eps) * self.weight"
    assert found.remedy is not None and "torch.sqrt(x + eps)" in found.remedy.ours


def test_what_was_wrong_before_is_named() -> None:
    x = torch.randn(4, 8)
    x[2, 3] = torch.inf
    found = explained(made(), x=x)
    assert (found.kind, found.phase, found.name) == ("bad data", "data", "input 0")
    assert "in rows 2 of 4" in found.what and found.remedy is not None
    model = made()
    with torch.no_grad():
        model.head.bias[1] = torch.nan
    found = explained(model)
    assert (found.phase, found.name, found.module) == ("weights", "head.bias", "head")
    assert found.remedy is not None


def test_masks_of_infinity_are_meant() -> None:
    def causal(x: Tensor) -> Tensor:
        mask = torch.full((8, 8), -torch.inf).triu(1)
        return torch.softmax(x @ x.T @ torch.zeros(4, 8) + mask[:4], -1)

    found = explained(made(then=causal))
    assert found.kind == "nothing"
    model = made(then=causal)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf
    assert explained(model).name == "head.weight"


def test_gradients_that_a_scale_makes_overflow() -> None:
    model = made().half()
    torch.manual_seed(1)
    x = torch.randn(4, 8).half()
    found = precision_lab.explain(model, (x,), output_gradients=torch.full((4, 3), 6e4).half())
    assert (found.kind, found.phase) == ("overflow in backward", "backward")
    assert found.module == "head" and found.remedy is not None and found.remedy.kind == "scale"
    assert found.as_dict()["remedies"][0]["outcome"] == "finite"
    assert Explanation.from_dict(found.as_dict()).as_dict() == found.as_dict()


def test_gradients_that_underflow() -> None:
    model = made().half()
    torch.manual_seed(1)
    x = torch.randn(4, 8).half()
    with torch.no_grad():
        model.head.weight.mul_(0.1)
    gradient = torch.full((4, 3), 6e-8).half()
    found = precision_lab.explain(model, (x,), output_gradients=gradient)
    assert (found.kind, found.phase) == ("gradient underflow", "backward")
    assert found.remedy is not None and "GradScaler" in found.remedy.torch


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"explain\(dict\): expected a torch.nn.Module"):
        precision_lab.explain({}, ())  # type: ignore[arg-type]
