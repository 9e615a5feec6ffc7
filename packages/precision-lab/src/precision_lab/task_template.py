# mypy: ignore-errors
"""What `precision compare` trains: change it to your own model, data and loss. It runs as it is.

    precision compare FILE:make

trains it in every precision from the same start, and says what each costs, saves and changes.
"""

import torch
import torch.nn.functional as F
from torch import nn

import precision_lab


def make():
    """Called once in each process, after seeding: build everything in float32 on the CPU, as you would without us."""
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return precision_lab.Task(model, optimizer, batches=batches, loss=loss, evaluate=evaluate)


def batches(seed):
    """An iterable of batches, endless or not; the same seed gives the same batches. A DataLoader will do, too."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield draw(64, generator)


def loss(model, batch):
    """The training loss of a batch, one value. Batches are on the model's device, in the dtypes that you gave them."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


def evaluate(model):
    """A number, lower is better, of data that is not trained on. Without it: the loss on batches of another seed."""
    device = next(model.parameters()).device
    inputs, targets = (part.to(device) for part in draw(2048, torch.Generator().manual_seed(10**6)))
    return F.cross_entropy(model(inputs), targets).item()


# ---- the data, made up: points around ten centres. Yours goes here.

CENTRES = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))


def draw(count, generator):
    targets = torch.randint(10, (count,), generator=generator)
    return CENTRES[targets] + 1.5 * torch.randn(count, 32, generator=generator), targets
