import copy
import warnings

import pytest
import torch
from torch import nn

import precision_bnb


def trained(model, optimizer, steps=20):
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what bitsandbytes compiles
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_the_settings_of_each_group_are_kept_and_steps_are_nearly_those_of_torch(kind):
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Linear(96, 64, bias=False), nn.Tanh(), nn.Linear(64, 96, bias=False))
    decay = 0.1 if kind is torch.optim.AdamW else 0.0
    start, theirs = copy.deepcopy(mine), copy.deepcopy(mine)

    def made(model):
        groups = [{"params": [model[0].weight], "lr": 3e-3}, {"params": [model[2].weight], "betas": (0.8, 0.99)}]
        return kind(groups, lr=1e-3, eps=1e-5, weight_decay=decay)

    optimizer = precision_bnb.with_8bit_states(made(mine))
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"], second["betas"]) == (3e-3, 1e-3, (0.8, 0.99))
    assert all((group["eps"], group["weight_decay"]) == (1e-5, decay) for group in optimizer.param_groups)
    trained(mine, optimizer)
    trained(theirs, made(theirs))
    assert optimizer.state[mine[0].weight]["state1"].dtype is torch.uint8
    for a, b, was in zip(mine.parameters(), theirs.parameters(), start.parameters(), strict=True):
        moved = (b - was).norm()
        assert 0 < (a - b).norm() < 0.1 * moved


def adam(**settings):
    return torch.optim.Adam([nn.Parameter(torch.ones(2))], **settings)


@pytest.mark.parametrize(
    ("optimizer", "error", "said"),
    [
        (torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), TypeError, "Adam and AdamW, and this is a SGD"),
        (adam(weight_decay=0.1), ValueError, "as AdamW does, where torch's Adam adds it to the gradients"),
        (adam(amsgrad=True), ValueError, r"Adam\(amsgrad=True\)"),
    ],
)
def test_what_would_train_otherwise_is_refused(optimizer, error, said):
    with pytest.raises(error, match=said):
        precision_bnb.with_8bit_states(optimizer)


def test_an_optimizer_that_has_stepped_is_refused():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="stepped already"):
        precision_bnb.with_8bit_states(optimizer)
