import torch
from accelerate import Accelerator
from torch import nn


def train(steps=10):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.utils.data.TensorDataset(torch.randn(8 * steps, 16))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses = []
    for (x,) in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), x[:, :1])
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()
            scheduler.step()  # does nothing where the optimizer's does nothing
            optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.save_state("last")
    return losses, [param.detach() for param in model.parameters()]
