"""A remedy is told in the words of the library, and of the class that the user made of it."""

from __future__ import annotations

import pytest

from precision_lab.auditing.finding import Remedy

REMEDY = Remedy(
    torch="torch",
    ours="ours",
    lightning='Fabric(precision="bf16-mixed")',
    accelerate="Accelerator()",
    transformers="TrainingArguments(bf16=True)",
    deepspeed="engine.backward(loss)",
)


@pytest.mark.parametrize(
    ("libraries", "host", "expected"),
    [
        ([], "", "torch"),
        (["Lightning"], "Fabric", 'Fabric(precision="bf16-mixed")'),
        (["Lightning"], "Trainer", 'Trainer(precision="bf16-mixed")'),
        (["Accelerate"], "Accelerator", "Accelerator()"),
        (["Accelerate", "transformers"], "TrainingArguments", "TrainingArguments(bf16=True)"),
        (["Accelerate", "TRL"], "SFTConfig", "SFTConfig(bf16=True)"),
        (["DeepSpeed"], "", "engine.backward(loss)"),
        (["precision"], "Fabric", "ours"),
    ],
)
def test_words(libraries: list[str], host: str, expected: str) -> None:
    assert REMEDY.for_(libraries, host) == expected


def test_lightnings_trainer_may_have_words_of_its_own() -> None:
    remedy = Remedy(torch="torch", ours="ours", lightning="fabric.backward(loss)", trainer="self.manual_backward(loss)")
    assert remedy.for_(["Lightning"], "Trainer") == "self.manual_backward(loss)"
    assert remedy.for_(["Lightning"], "Fabric") == "fabric.backward(loss)"
    assert remedy.for_(["Accelerate"], "Accelerator") == "torch"
