import torch
from torch import nn

from precision_core import Fabric


def train(steps=10):
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    fabric.seed_everything(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    data = torch.utils.data.TensorDataset(torch.randn(8 * steps, 16))
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(data, batch_size=8))
    losses = []
    for (x,) in loader:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x[:, :1])
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        losses.append(loss.item())
    fabric.save("last.ckpt", {"model": model, "optimizer": optimizer})
    return losses, [param.detach() for param in model.parameters()]
