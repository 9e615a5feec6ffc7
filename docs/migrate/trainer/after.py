import torch
from torch import nn

from precision_core import Fabric


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.body(x), labels)}


def train(steps=10):
    torch.manual_seed(0)
    model = Model()
    data = [{"x": x, "labels": x[:1]} for x in torch.randn(8, 16)]
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model, optimizer = fabric.setup(model, optimizer)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    scheduler = fabric.setup_schedulers(decay)
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))
    losses = []
    while len(losses) < steps:
        for batch in loader:
            optimizer.zero_grad()
            loss = model(**batch)["loss"]
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    fabric.save("last.ckpt", {"model": model, "optimizer": optimizer, "loader": loader})
    return losses, [param.detach() for param in model.parameters()]
