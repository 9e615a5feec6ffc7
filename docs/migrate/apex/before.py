import torch
from apex import amp
from torch import nn


def train(steps=10):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = amp.initialize(model, optimizer, opt_level="O1")
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 16).cuda()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x[:, :1])
        with amp.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()
        nn.utils.clip_grad_norm_(amp.master_params(optimizer), max_norm=1.0)
        optimizer.step()
        losses.append(loss.item())
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "amp": amp.state_dict()}
    torch.save(state, "last.ckpt")
    return losses, [param.detach() for param in model.parameters()]
