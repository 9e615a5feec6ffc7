"""Scaled gradients that are clipped, changed, unscaled twice, or stepped after an update: each with its right twin."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from precision_lab.auditing.context import audit
from precision_lab.auditing.finding import Finding
from precision_lab.auditing.record import Event
from precision_lab.auditing.rules_scaler import _clips

Params = list[nn.Parameter]
Loop = Callable[["Training"], None]


class Training:
    """Two small models with an optimizer each, and one scaler, as a loop has them."""

    def __init__(self, kind: type[torch.optim.Optimizer] = torch.optim.SGD, fused: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        self.other = nn.Linear(8, 2)
        options = {"fused": True} if fused else {}
        self.optimizer = kind(self.model.parameters(), lr=0.01, **options)  # type: ignore[call-arg]
        self.second = kind(self.other.parameters(), lr=0.01)  # type: ignore[call-arg]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.second_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.scale = 512.0

    @property
    def params(self) -> Params:
        return [param for param in self.model.parameters() if param.grad is not None]

    @property
    def all(self) -> Params:
        return [*self.params, *self.other.parameters()]

    def loss(self, model: nn.Module | None = None) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return nn.functional.cross_entropy((model or self.model)(torch.randn(4, 8)), torch.tensor([0, 1, 0, 1]))

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.loss()).backward()

    def both(self) -> None:
        self.optimizer.zero_grad()
        self.second.zero_grad()
        self.scaler.scale(self.loss() + self.loss(self.other)).backward()

    def by_hand(self) -> None:
        self.optimizer.zero_grad()
        (self.loss() * self.scale).backward()

    def end(self, *optimizers: torch.optim.Optimizer) -> None:
        for each in optimizers or [self.optimizer]:
            self.scaler.step(each)
        self.scaler.update()


def found(loop: Loop, training: Training | None = None, fails: type[Exception] | None = None) -> list[Finding]:
    training = training or Training()
    with audit(training.model, training.other) as report:
        if fails is None:
            loop(training)
            loop(training)
        else:
            with pytest.raises(fails):
                loop(training)
    return report.at("warning")


def norm(params: Iterable[Tensor]) -> Tensor:
    return torch.sqrt(sum((param.grad.pow(2).sum() for param in params), torch.zeros(())))  # type: ignore[union-attr]


# ---------------------------------------------------------------- clipped while scaled


def plain(t: Training) -> None:
    t.backward()
    nn.utils.clip_grad_norm_(t.params, 1.0)  # here
    t.end()


def not_foreach(t: Training) -> None:
    t.backward()
    nn.utils.clip_grad_norm_(t.params, 1.0, foreach=False)  # here
    t.end()


def values(t: Training) -> None:
    t.backward()
    nn.utils.clip_grad_value_(t.params, 0.5)  # here
    t.end()


def handwritten(t: Training) -> None:
    t.backward()
    coefficient = torch.clamp(1.0 / (norm(t.params) + 1e-6), max=1.0)
    for param in t.params:
        param.grad.mul_(coefficient)  # type: ignore[union-attr]  # here
    t.end()


def handwritten_number(t: Training) -> None:
    t.backward()
    total = float(norm(t.params))
    if total > 0.3:
        for param in t.params:
            param.grad = param.grad * (0.3 / total)  # type: ignore[operator]  # here
    t.end()


def normalised(t: Training) -> None:
    t.backward()
    for param in t.params:
        param.grad.div_(param.grad.norm() + 1e-8)  # type: ignore[union-attr]  # here
    t.end()


def clamped(t: Training) -> None:
    t.backward()
    for param in t.params:
        param.grad = param.grad.clamp(-1, 1)  # type: ignore[union-attr]  # here
    t.end()


def one_of_two(t: Training) -> None:
    t.both()
    t.scaler.unscale_(t.optimizer)
    nn.utils.clip_grad_norm_(t.all, 1.0)  # here
    t.end(t.optimizer, t.second)


def of_the_other(t: Training) -> None:
    t.both()
    t.scaler.unscale_(t.second)
    nn.utils.clip_grad_norm_(t.params, 1.0)  # here
    t.end(t.optimizer, t.second)


def accumulated(t: Training) -> None:
    t.optimizer.zero_grad()
    for _ in range(2):
        t.scaler.scale(t.loss() / 2).backward()
        nn.utils.clip_grad_norm_(t.params, 1.0)  # here
    t.end()


def manual_scale(t: Training) -> None:
    t.by_hand()
    nn.utils.clip_grad_norm_(t.params, 1.0)  # here
    for param in t.params:
        param.grad.div_(t.scale)  # type: ignore[union-attr]
    t.optimizer.step()


def adaptive(t: Training) -> None:
    """Clipping by the ratio to the parameter's own norm, copied into the gradient."""
    t.backward()
    for param in t.params:
        gradient = param.grad.detach()  # type: ignore[union-attr]
        most = param.detach().norm() * 0.01
        cut = gradient * (most / gradient.norm().clamp(min=1e-6))  # here
        gradient.copy_(torch.where(gradient.norm() > most, cut, gradient))
    t.end()


def assigned(t: Training) -> None:
    """Gradients that torch.autograd.grad returned."""
    params = list(t.model.parameters())
    for param, gradient in zip(params, torch.autograd.grad(t.scaler.scale(t.loss()), params), strict=True):
        param.grad = gradient
    nn.utils.clip_grad_norm_(params, 1.0)  # here
    t.end()


def in_a_hook(t: Training) -> None:
    hooks = [
        param.register_hook(lambda grad: grad.clamp(-1, 1))  # here
        for param in t.model.parameters()
    ]
    t.backward()
    for hook in hooks:
        hook.remove()
    t.end()


def in_a_hook_after(t: Training) -> None:
    def clip(param: Tensor) -> None:
        nn.utils.clip_grad_norm_([param], 1.0)  # here

    hooks = [param.register_post_accumulate_grad_hook(clip) for param in t.model.parameters()]
    t.backward()
    for hook in hooks:
        hook.remove()
    t.end()


CLIPPED = [
    *(
        plain,
        not_foreach,
        values,
        handwritten,
        handwritten_number,
        normalised,
        clamped,
        one_of_two,
        of_the_other,
    ),
    *(accumulated, manual_scale, adaptive, assigned, in_a_hook, in_a_hook_after),
]


@pytest.mark.parametrize("loop", CLIPPED, ids=lambda loop: loop.__name__)
def test_clipping_of_scaled_gradients_is_found(loop: Loop) -> None:
    (finding,) = found(loop)
    assert (finding.code, finding.level) == ("clipped-while-scaled", "error")
    assert finding.line is not None
    assert finding.line.text.endswith("# here")
    assert "scaler.unscale_(optimizer)" in finding.remedy.torch
    assert ("512" if loop is manual_scale else "1,024") in finding.what


def test_clipping_before_a_fused_step_is_found() -> None:
    (finding,) = found(plain, Training(torch.optim.AdamW, fused=True))
    assert finding.code == "clipped-while-scaled"


def clip(t: Training) -> None:
    t.backward()
    t.scaler.unscale_(t.optimizer)
    nn.utils.clip_grad_norm_(t.params, 1.0)
    t.end()


def clip_both(t: Training) -> None:
    t.both()
    t.scaler.unscale_(t.optimizer)
    t.scaler.unscale_(t.second)
    nn.utils.clip_grad_norm_(t.all, 1.0)
    t.end(t.optimizer, t.second)


def scaled_bound(t: Training) -> None:
    t.backward()
    nn.utils.clip_grad_norm_(t.params, 1.0 * t.scaler.get_scale())
    t.end()


def mean_by_hand(t: Training) -> None:
    t.optimizer.zero_grad()
    for _ in range(4):
        t.scaler.scale(t.loss()).backward()
    for param in t.params:
        param.grad /= 4  # type: ignore[operator]
    t.end()


def logged(t: Training) -> None:
    t.backward()
    assert float(norm(t.params)) > 0
    t.end()


def accumulated_right(t: Training) -> None:
    t.optimizer.zero_grad()
    for _ in range(4):
        t.scaler.scale(t.loss() / 4).backward()
    clip_after = t.scaler.unscale_(t.optimizer)
    assert clip_after is None
    nn.utils.clip_grad_value_(t.params, 0.1)
    t.end()


def two_losses(t: Training) -> None:
    t.optimizer.zero_grad()
    (t.scaler.scale(t.loss()) + 0.5 * t.scaler.scale(t.loss())).backward()
    t.end()


def manual_scale_right(t: Training) -> None:
    t.by_hand()
    for param in t.params:
        param.grad = param.grad / t.scale  # type: ignore[operator]
    nn.utils.clip_grad_norm_(t.params, 0.01)
    t.optimizer.step()


def projected(t: Training) -> None:
    """Gradients of two losses, one without what it has of the other: the same at every scale."""
    taken = []
    for _ in range(2):
        t.backward()
        taken.append([param.grad.clone() for param in t.params])  # type: ignore[union-attr]
    for param, one, other in zip(t.params, *taken, strict=True):
        share = (one * other).sum() / (other * other).sum()
        param.grad = one - share * other
    t.end()


def assigned_right(t: Training) -> None:
    params = list(t.model.parameters())
    for param, gradient in zip(params, torch.autograd.grad(t.scaler.scale(t.loss()), params), strict=True):
        param.grad = gradient
    t.scaler.unscale_(t.optimizer)
    nn.utils.clip_grad_norm_(params, 1.0)
    t.end()


def hook_right(t: Training) -> None:
    hooks = [param.register_hook(lambda grad: grad * 0.5) for param in t.model.parameters()]
    t.backward()
    for hook in hooks:
        hook.remove()
    t.end()


@pytest.mark.parametrize(
    "loop",
    [
        assigned_right,
        projected,
        hook_right,
        clip,
        clip_both,
        scaled_bound,
        mean_by_hand,
        logged,
        accumulated_right,
        two_losses,
        manual_scale_right,
    ],
    ids=lambda loop: loop.__name__,
)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_right_loops_give_no_finding(loop: Loop, kind: str) -> None:
    assert found(loop, Training(getattr(torch.optim, kind), fused=kind == "AdamW")) == []


# ---------------------------------------------------------------- changed while scaled


def noise(t: Training) -> None:
    for param in t.params:
        param.grad += 0.01 * torch.randn_like(param.grad)  # type: ignore[arg-type]


def nan_to_num(t: Training) -> None:
    for param in t.params:
        torch.nan_to_num_(param.grad)  # type: ignore[arg-type]


def decay(t: Training) -> None:
    for param in t.params:
        param.grad.add_(param.data, alpha=0.01)  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [noise, nan_to_num, decay], ids=lambda change: change.__name__)
@pytest.mark.parametrize("right", [False, True])
def test_changing_scaled_gradients_is_a_warning(change: Loop, right: bool) -> None:
    def loop(t: Training) -> None:
        t.backward()
        if right:
            t.scaler.unscale_(t.optimizer)
        change(t)
        t.end()

    assert [(each.code, each.level) for each in found(loop)] == ([] if right else [("changed-while-scaled", "warning")])


def test_a_difference_of_scaled_gradients_is_one_of_gradients() -> None:
    def centralised(t: Training) -> None:
        t.backward()
        for param in t.params:
            param.grad -= param.grad.mean()  # type: ignore[union-attr, operator]
        t.end()

    assert found(centralised) == []


# ---------------------------------------------------------------- unscaled twice


def then_by_hand(t: Training) -> None:
    t.backward()
    t.scaler.unscale_(t.optimizer)
    for param in t.params:
        param.grad /= t.scaler.get_scale()  # type: ignore[operator]  # here
    t.end()


def first_by_hand(t: Training) -> None:
    t.backward()
    inverse = 1.0 / t.scaler.get_scale()
    for param in t.params:
        param.grad = param.grad * inverse  # type: ignore[operator]
    t.scaler.step(t.optimizer)  # here
    t.scaler.update()


def by_two_scalers(t: Training) -> None:
    t.second_scaler.scale(torch.zeros(()))
    t.backward()
    t.scaler.unscale_(t.optimizer)
    t.second_scaler.step(t.optimizer)  # here
    t.scaler.update()
    t.second_scaler.update()


@pytest.mark.parametrize("loop", [then_by_hand, first_by_hand, by_two_scalers], ids=lambda loop: loop.__name__)
def test_unscaling_twice_is_found(loop: Loop) -> None:
    (finding,) = found(loop)
    assert (finding.code, finding.level) == ("unscaled-twice", "error")
    assert finding.line is not None
    assert finding.line.text.endswith("# here")


def test_unscaling_by_hand_before_a_fused_step_is_found() -> None:
    (finding,) = found(first_by_hand, Training(torch.optim.AdamW, fused=True))
    assert finding.code == "unscaled-twice"


def test_what_torch_raises_at_is_found() -> None:
    def loop(t: Training) -> None:
        t.backward()
        t.scaler.unscale_(t.optimizer)
        t.scaler.unscale_(t.optimizer)  # here

    (finding,) = found(loop, fails=RuntimeError)
    assert finding.code == "unscaled-twice"
    assert finding.line is not None
    assert finding.line.text.endswith("# here")
    assert "RuntimeError" in finding.why


@pytest.mark.parametrize(
    ("by", "read", "sure"), [(0.0, {1}, "likely"), (0.0, set(), ""), (0.5, {1}, ""), (0.3, {1}, "likely")]
)
def test_a_factor_after_a_norm_was_read_is_clipping(by: float, read: set[int], sure: str) -> None:
    """Of a norm that overflowed the factor is zero; one half is a mean over two micro-batches."""
    data = {"functions": [], "how": "mul_", "computed": False, "by": by, "ids": [1]}
    assert _clips(Event("gradients", None, "", 0, data), read) == sure
