import torch
from torch import nn

from precision_core import Fabric


def train(steps=10):
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.utils.data.TensorDataset(torch.randn(8 * steps, 16))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    model, optimizer = fabric.setup(model, optimizer)
    loader, scheduler = fabric.setup_dataloaders(loader), fabric.setup_schedulers(scheduler)
    losses = []
    for number, (x,) in enumerate(loader, 1):
        last = number % 2 == 0 or number == len(loader)
        with fabric.no_backward_sync(model, enabled=not last):
            loss = nn.functional.mse_loss(model(x), x[:, :1])
            fabric.backward(loss / 2)
        if last:
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            scheduler.step()  # with the optimizer, not once a microbatch
            optimizer.zero_grad()
        losses.append(loss.item())
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    fabric.save("last.ckpt", state)
    return losses, [param.detach() for param in model.parameters()]
