"""Loops of other libraries: the same bits with a watch, all steps seen, and a fault named by the user's line."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import precision_lab
from precision_core import Fabric
from precision_lab.watching.watch import Watch

STEPS, BAD = 6, 4


class Net(nn.Module):
    """Gives its loss, and takes the square of a root where the batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        sharp = torch.log(labels)  # the fault
        return {"loss": (self.head(torch.relu(self.body(x))) - sharp).float().square().mean()}


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, fault: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(STEPS * 4, 4, generator=generator)
        self.y = torch.ones(STEPS * 4, 1)
        if fault:
            self.y[(BAD - 1) * 4 + 1] = 0.0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"x": self.x[at], "labels": self.y[at]}


def batches(fault: bool) -> list[dict[str, Tensor]]:
    return list(DataLoader(Rows(fault), batch_size=4))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


Watching = Callable[..., Any]
Loop = Callable[[bool, Watching, Path], nn.Module]


def plain(dtype: torch.dtype | None, scaled: bool = False) -> Loop:
    def loop(fault: bool, watching: Watching, folder: Path) -> nn.Module:
        model = Net()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        with watching(model, optimizer):
            for batch in batches(fault):
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss = model(**batch)["loss"]
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        return model

    return loop


def ours(mode: str) -> Loop:
    def loop(fault: bool, watching: Watching, folder: Path) -> nn.Module:
        fabric = Fabric(precision=mode, accelerator="cpu")
        model = Net()
        model, optimizer = fabric.setup(model, sgd(model))
        with watching(model, optimizer):
            for batch in batches(fault):
                fabric.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
        return model

    return loop


def accelerate(fault: bool, watching: Watching, folder: Path) -> nn.Module:
    library = pytest.importorskip("accelerate")
    accelerator = library.Accelerator(cpu=True, mixed_precision="bf16")
    model = Net()
    model, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(Rows(fault), batch_size=4))
    with watching(model, optimizer):
        for batch in loader:
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model)


def lightning_fabric(fault: bool, watching: Watching, folder: Path) -> nn.Module:
    library = pytest.importorskip("lightning.fabric")
    fabric = library.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = Net()
    model, optimizer = fabric.setup(model, sgd(model))
    with watching(model, optimizer):
        for batch in batches(fault):
            fabric.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    return model


def lightning_trainer(fault: bool, watching: Watching, folder: Path) -> nn.Module:
    library = pytest.importorskip("lightning")

    class Module(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.net)

    trainer = library.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Module()
    with watching(module.net):
        trainer.fit(module, DataLoader(Rows(fault), batch_size=4))
    return module.net


def transformers_trainer(fault: bool, watching: Watching, folder: Path) -> nn.Module:
    library = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options = library.TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        bf16=True,
    )

    class InOrder(library.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = Net()
    trainer = InOrder(model=model, args=options, train_dataset=Rows(fault))
    with watching(model):
        trainer.train()
    return model


LOOPS: dict[str, Loop] = {
    "32-true": plain(None),
    "bf16 autocast": plain(torch.bfloat16),
    "fp16 scaler": plain(torch.float16, scaled=True),
    **{f"Fabric {mode}": ours(mode) for mode in ("bf16-mixed", "bf16-true", "bf16-master", "16-mixed")},
    "Accelerate": accelerate,
    "Lightning Fabric": lightning_fabric,
    "Lightning Trainer": lightning_trainer,
    "transformers": transformers_trainer,
}


def train(name: str, fault: bool, folder: Path, watched: bool, **options: Any) -> tuple[list[Tensor], Watch | None]:
    torch.manual_seed(0)
    seen: list[Watch] = []

    def watching(*given: Any) -> Any:
        if not watched:
            return nullcontext()
        seen.append(precision_lab.watch(*given, every=2, file=folder / "run.jsonl", **options))
        return seen[0]

    logging.getLogger("lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries'
        model = LOOPS[name](fault, watching, folder)
    return [param.detach().clone() for param in model.parameters()], seen[0] if seen else None


@pytest.fixture(scope="module", autouse=True)
def bare() -> None:
    """In place of conftest's: transformers asks for its own requirements."""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert os.environ.get("RANK") is None


FAST = {"32-true", "bf16 autocast", "Fabric bf16-true"}
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.full) for name in LOOPS]


@pytest.mark.parametrize("name", EACH)
def test_the_same_bits_and_all_steps(tmp_path: Path, name: str) -> None:
    alone, _ = train(name, False, tmp_path, watched=False)
    for keep in (False, True):
        (tmp_path / "run.jsonl").unlink(missing_ok=True)
        values, watched = train(name, False, tmp_path, watched=True, keep=keep)
        for one, other in zip(alone, values, strict=True):
            assert torch.equal(one, other)
        assert watched is not None and watched.steps == STEPS and watched.alarms == []
        lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "step" in line]
        assert len(losses) == STEPS and all(loss > 0 for loss in losses) and lines[-1]["unseen"] == []
        samples = [line for line in lines if "sample" in line]
        assert [line["sample"] for line in samples] == [2, 4, 6]
        assert all({"body", "head"} <= set(line["modules"]) and line["parameters"] for line in samples)


@pytest.mark.parametrize("name", EACH)
def test_a_fault_is_named(tmp_path: Path, name: str) -> None:
    _, watched = train(name, True, tmp_path, watched=True)
    assert watched is not None
    alarm = watched.alarms[0]
    assert (alarm.kind, alarm.step, alarm.before_step) == ("loss", BAD, True)
    found = alarm.explanation
    assert found is not None, alarm.unexplained
    assert (found.kind, found.operation) == ("log of zero", "log")
    assert found.line is not None and found.line.text == "sharp = torch.log(labels)  # the fault"
    assert found.remedy is not None


def trl(folder: Path, watched: bool) -> tuple[list[Tensor], Watch | None]:
    library, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {**{f"w{number}": number for number in range(30)}, "<pad>": 30, "<eos>": 31}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 30, "eos_token_id": 31}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    texts = [" ".join(f"w{row * word % 30}" for word in range(8)) for row in range(24)]
    options = library.SFTConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        use_cpu=True,
        bf16=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trainer = library.SFTTrainer(
        model=model,
        args=options,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
        ),
    )
    found: Watch | None = None
    if watched:
        with precision_lab.watch(model, every=2, file=folder / "run.jsonl") as found:
            trainer.train()
    else:
        trainer.train()
    return [param.detach().clone() for param in model.parameters()], found


@pytest.mark.full
@pytest.mark.slow_start
def test_trl(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone, _ = trl(tmp_path, watched=False)
        values, watched = trl(tmp_path, watched=True)
    assert all(map(torch.equal, alone, values))
    assert watched is not None and watched.steps == 3 and watched.alarms == []  # two batches a step
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert all(line["norm"] > 0 for line in lines if "step" in line) and lines[-1]["unseen"] == []
