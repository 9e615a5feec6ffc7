"""Loops in which nothing is wrong: no finding above info, by any rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from planted import audited, mlp
from torch import Tensor, nn

from precision_core import Fabric

IDS = torch.randint(200, (4, 12))
X, Y = torch.randn(8, 16), torch.randint(4, (8,))
IMAGES = torch.randn(4, 3, 12, 12)
Loss = Callable[[nn.Module], Tensor]


def train(model: nn.Module, loss: Loss, autocast: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
    """Two steps of two micro-batches, with clipping, as everybody writes them."""
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    for _ in range(2):
        for _ in range(2):
            with torch.autocast("cpu", dtype, enabled=autocast):
                value = loss(model)
            (value / 2).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()


class Language(nn.Module):
    """Embeddings, a body, and logits over the vocabulary."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(200, 16), body, nn.Linear(16, 200)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body(self.embed(ids))
        return self.head(hidden[0] if isinstance(hidden, tuple) else hidden)


def next_token(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())


def classify(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return Language(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


class Llama(nn.Module):
    """Rotary attention and a norm in float32, as transformers' Llama has them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.weight = nn.Linear(16, 48), nn.Linear(16, 16), nn.Parameter(torch.ones(16))
        self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, 8, 2) / 8), persistent=False)

    def norm(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def rotated(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            angles = torch.outer(torch.arange(x.shape[-2]).float(), self.inv_freq.float())
            cos, sin = torch.cat([angles] * 2, -1).cos().to(x.dtype), torch.cat([angles] * 2, -1).sin().to(x.dtype)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(-2))


class Vision(nn.Module):
    """Patches by a convolution, a table of sines that is added, an encoder: residuals are float32 from there."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(9.0), 1 / 10000 ** (torch.arange(0, 16, 2) / 16))
        self.register_buffer("pe", torch.cat([angles.sin(), angles.cos()], -1))
        self.patches, self.drop, self.head = nn.Conv2d(3, 16, 4, 4), nn.Dropout(0.1), nn.Linear(16, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.patches(x).flatten(2).transpose(1, 2) + self.pe)
        return self.head(self.body(x).mean(1))


def convolutions() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(8, 4))


LOOPS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "mlp": (mlp, classify),
    "encoder": (encoder, next_token),
    "llama": (lambda: Language(Llama()), next_token),
    "lstm": (lambda: Language(nn.LSTM(16, 16, batch_first=True)), next_token),
    "convolutions": (convolutions, lambda model: F.cross_entropy(model(IMAGES), Y[:4])),
    "vision": (Vision, lambda model: F.cross_entropy(model(IMAGES), Y[:4])),
    "regression": (lambda: mlp(out=1), lambda model: F.mse_loss(model(X)[:, 0], Y.float())),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_plain_loops(name: str, autocast: bool) -> None:
    make, loss = LOOPS[name]
    report = audited(lambda: train(make(), loss, autocast))
    assert not report.at("warning"), report.findings


def test_float64_on_purpose() -> None:
    report = audited(lambda: train(mlp().double(), lambda model: F.cross_entropy(model(X.double()), Y), False))
    assert report.findings == []


def test_a_scaler() -> None:
    model = mlp()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")

    def run() -> None:
        for _ in range(2):
            with torch.autocast("cpu", torch.float16):
                loss = classify(model)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    assert not audited(run).at("warning")


MODES = ["64-true", "32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed", "bf16-master", "16-master"]


@pytest.mark.parametrize("mode", [*MODES, "bf16-stochastic"])
@pytest.mark.parametrize("name", ["mlp", pytest.param("llama", marks=pytest.mark.full), "convolutions"])
def test_our_fabric(name: str, mode: str) -> None:
    make, loss = LOOPS[name]

    def run() -> None:
        fabric = Fabric(accelerator="cpu", precision=mode)
        model = make()
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5))
        for _ in range(2):
            fabric.backward(loss(model))
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()

    report = audited(run)
    assert not report.at("warning"), report.findings


@pytest.mark.full
@pytest.mark.parametrize("mode", ["32-true", "bf16-true", "bf16-mixed"])
def test_lightnings_fabric(mode: str) -> None:
    lightning = pytest.importorskip("lightning_fabric")

    def run() -> None:
        fabric = lightning.Fabric(accelerator="cpu", precision=mode, devices=1)
        model = mlp()
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        for _ in range(2):
            fabric.backward(classify(model))
            optimizer.step()
            optimizer.zero_grad()

    report = audited(run)
    assert not report.at("warning"), report.findings
    assert ("half-optimizer-state" in [each.code for each in report.findings]) == (mode == "bf16-true")


@pytest.mark.full
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["Llama", "Bert", "GPT2"])
def test_transformers_models(kind: str, attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 2000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    extra = {} if kind == "GPT2" else {"intermediate_size": 64}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, **extra, attn_implementation=attention, bos_token_id=0, eos_token_id=0
    )
    head = {"Llama": "LlamaForCausalLM", "Bert": "BertForMaskedLM", "GPT2": "GPT2LMHeadModel"}[kind]
    mask = torch.ones_like(IDS)
    mask[0, -3:] = 0

    def loss(model: nn.Module) -> Tensor:
        return model(input_ids=IDS, attention_mask=mask, labels=IDS).loss

    report = audited(lambda: train(getattr(transformers, head)(config), loss))
    assert not report.at("warning"), report.findings


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's own calls of transformers
def test_an_adapter_of_peft_on_a_half_model() -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes = {"vocab_size": 2000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    report = audited(lambda: train(model, lambda model: model(input_ids=IDS, labels=IDS).loss, False))
    assert not report.at("warning"), report.findings
