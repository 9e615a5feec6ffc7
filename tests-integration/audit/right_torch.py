"""Training loops in plain torch that are right, written after torch's own examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LOOPS: dict[str, Callable[[str], Any]] = {}


def loop(function: Callable[[str], Any]) -> Callable[[str], Any]:
    """Adds a loop to the table; it is given a folder to write into."""
    LOOPS[function.__name__] = function
    return function


def mlp(width: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, 4))


def data(count: int = 4) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(8 * count, 16), torch.randint(4, (8 * count,))), batch_size=8)


@loop
def plain_float32(folder: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in data():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@loop
def float64_on_purpose(folder: str) -> None:
    model = mlp().double()
    optimizer = torch.optim.Adam(model.parameters())
    for x, y in data():
        optimizer.zero_grad()
        F.cross_entropy(model(x.double()), y).backward()
        optimizer.step()


@loop
def amp_recipe_float16(folder: str) -> None:
    """torch's recipe: scale, unscale, clip, step, update; the checkpoint has the scaler."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    for x, y in data():
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    torch.save(checkpoint, f"{folder}/last.pt")


@loop
def amp_accumulation(folder: str) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    for index, (x, y) in enumerate(data(8)):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y) / 4
        scaler.scale(loss).backward()
        if (index + 1) % 4 == 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_value_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


@loop
def amp_gradient_penalty(folder: str) -> None:
    """torch's recipe for a gradient penalty under a scaler."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    for x, y in data():
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaled = torch.autograd.grad(scaler.scale(loss), list(model.parameters()), create_graph=True)
        inverse = 1.0 / scaler.get_scale()
        with torch.autocast("cpu", torch.float16):
            norm = sum((grad * inverse).pow(2).sum() for grad in scaled)
            loss = loss + 0.01 * norm.sqrt()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@loop
def amp_two_optimizers(folder: str) -> None:
    """Two models, two optimizers, one scaler, one update."""
    one, two = mlp(), mlp()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (one, two)]
    scaler = torch.amp.GradScaler("cpu")
    for x, y in data():
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            first, second = one(x), two(x)
            loss0 = F.cross_entropy(2 * first + 3 * second, y)
            loss1 = F.cross_entropy(3 * first - 5 * second, y)
        scaler.scale(loss0).backward(retain_graph=True)
        scaler.scale(loss1).backward()
        scaler.unscale_(optimizers[0])
        nn.utils.clip_grad_norm_(one.parameters(), 1.0)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()


@loop
def amp_scheduler_on_steps(folder: str) -> None:
    """The scheduler is stepped only where the scaler has not skipped; the first step overflows."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for x, y in data(8):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            scheduler.step()
        optimizer.zero_grad()


@loop
def bfloat16_autocast(folder: str) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    for x, y in data():
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=False)
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(x)
        model.train()
    torch.save(model.state_dict(), f"{folder}/model.pt")


@loop
def evaluation_in_float32(folder: str) -> None:
    """Trained under autocast, evaluated without it on purpose."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for x, y in data():
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.inference_mode():
            F.cross_entropy(model(x), y).item()
        model.train()


@loop
def convolutions_and_batch_norm(folder: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(torch.randn(4, 3, 12, 12)), torch.randint(4, (4,)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0])


@loop
def lstm_tagger(folder: str) -> None:
    model = Tagger()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        ids = torch.randint(50, (4, 12))
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class Rotary(nn.Module):
    """Attention with rotary embeddings: tables in float32 that are cast at the end, as in transformers."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.weight = nn.Parameter(torch.ones(width))
        size = width // heads
        frequencies = 1.0 / 10000.0 ** (torch.arange(0, size, 2).float() / size)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def norm(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        with torch.autocast("cpu", enabled=False):
            angles = torch.arange(length, device=x.device).float()[:, None] * self.inv_freq[None, :].float()
            cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = q * cos + turned(q) * sin, k * cos + turned(k) * sin
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))


def turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class Language(nn.Module):
    """A decoder with tied weights."""

    def __init__(self, vocabulary: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 32)
        self.blocks = nn.ModuleList([Rotary() for _ in range(2)])
        self.head = nn.Linear(32, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@loop
def rotary_language_model(folder: str) -> None:
    model = Language()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(3):
        ids = torch.randint(64, (2, 400))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@loop
def encoder_with_dropout(folder: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 4))
    optimizer = torch.optim.NAdam(model.parameters())
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(4, 6, 16)).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@loop
def compiled_model(folder: str) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = torch.compile(model, backend="aot_eager")
    for x, y in data():
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@loop
def checkpointed_activations(folder: str) -> None:
    from torch.utils.checkpoint import checkpoint

    model = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for x, _ in data():
        with torch.autocast("cpu", torch.bfloat16):
            for layer in model:
                x = checkpoint(lambda value, layer=layer: F.gelu(layer(value)), x, use_reentrant=False)
            loss = x.float().pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@loop
def gan(folder: str) -> None:
    generator, judge = nn.Linear(4, 16), nn.Linear(16, 1)
    first = torch.optim.Adam(generator.parameters(), lr=1e-3)
    second = torch.optim.Adam(judge.parameters(), lr=1e-3)
    for x, _ in data():
        with torch.autocast("cpu", torch.bfloat16):
            made = generator(torch.randn(8, 4))
            real, false = judge(x), judge(made.detach())
            loss = F.softplus(-real.float()).mean() + F.softplus(false.float()).mean()
        second.zero_grad()
        loss.backward()
        second.step()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.softplus(-judge(made).float()).mean()
        first.zero_grad()
        loss.backward()
        first.step()


@loop
def lbfgs(folder: str) -> None:
    model = mlp().double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    x, y = torch.randn(8, 16, dtype=torch.float64), torch.randint(4, (8,))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)


@loop
def moving_average_of_weights(folder: str) -> None:
    model = mlp()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for x, y in data():
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        optimizer.zero_grad()


@loop
def frozen_backbone(folder: str) -> None:
    """A frozen half of the model in bfloat16, a head in float32 that is trained."""
    backbone = mlp().bfloat16().requires_grad_(False).eval()
    head = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for x, y in data():
        with torch.no_grad():
            features = backbone(x.bfloat16()).float()
        F.cross_entropy(head(features), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@loop
def spectra(folder: str) -> None:
    """Complex values inside, taken to real ones by their absolute value."""
    model = nn.Linear(9, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in data():
        spectrum = torch.fft.rfft(x).abs()
        F.cross_entropy(model(spectrum), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@loop
def reinforce(folder: str) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for x, _ in data():
        with torch.no_grad():
            actions = torch.distributions.Categorical(logits=model(x)).sample()
        logits = model(x)
        chosen = torch.distributions.Categorical(logits=logits).log_prob(actions)
        loss = -(chosen * torch.randn(8)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@loop
def weighted_losses(folder: str) -> None:
    """Weights on losses are no loss scale."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for x, y in data():
        loss = 100.0 * F.cross_entropy(model(x), y) + 0.5 * model[0].weight.pow(2).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
