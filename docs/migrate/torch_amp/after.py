import torch
from torch import nn

from precision_core import Fabric


def train(steps=10):
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", precision="16-mixed")
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    scheduler = fabric.setup_schedulers(torch.optim.lr_scheduler.StepLR(optimizer, step_size=5))
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 16)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x[:, :1])
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        scheduler.step()  # does nothing after a skipped step, and nothing waits
        losses.append(loss.item())
    fabric.save("last.ckpt", {"model": model, "optimizer": optimizer})
    return losses, [param.detach() for param in model.parameters()]
