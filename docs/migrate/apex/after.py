import torch
from torch import nn

from precision_core import Fabric


def train(steps=10):
    torch.manual_seed(0)
    fabric = Fabric(accelerator="auto", precision="16-mixed")
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    losses = []
    for _ in range(steps):
        x = fabric.to_device(torch.randn(8, 16))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x[:, :1])
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        losses.append(loss.item())
    fabric.save("last.ckpt", {"model": model, "optimizer": optimizer})
    return losses, [param.detach() for param in model.parameters()]
