"""precision.json: a precision that was chosen by measurement, for one model on one kind of machine.

    {"version": 1,
     "precision": "bf16-true; *.norm: 32-true",
     "reasons": {"*.norm": "20 % of its updates ..."},
     "fingerprint": {"model": "sha256 of names and shapes", "machine": {"device": "cpu", "formats": {...}}},
     "made_by": "precision choose task.py:make"}

`Fabric(precision="auto")` reads it from the working directory, `"auto:PATH"` another. Whoever measures writes it with
`write_chosen`. It holds for the model and the machine that were measured: others are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from precision_core.hardware import FORMATS
from precision_core.policy.dtypes import dtype_name

FILE = "precision.json"
AUTO = "auto"
VERSION = 1


@dataclass(frozen=True)
class Chosen:
    """The contents of a precision.json."""

    precision: str
    """What `Fabric(precision=...)` takes."""
    model: str
    """`model_fingerprint` of the model that was measured."""
    machine: Mapping[str, Any]
    """`machine_fingerprint` of where it was."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Exception (its pattern) -> why it is needed."""
    made_by: str = ""
    """The command that measures again."""
    path: str = FILE

    def check_machine(self, device_type: str) -> None:
        """Raises `ValueError` where this machine is none like the one that was measured; says what differs."""
        here = machine_fingerprint(device_type)
        if here == self.machine:
            return
        there = self.machine.get("device")
        if there != device_type:
            differs = f"on {there}, and this run is on {device_type}"
        else:
            before = self.machine.get("formats", {})
            changed = [
                f"{name} is {here['formats'].get(name, 'unknown')} here and was {before.get(name, 'unknown')} there"
                for name in sorted({*before, *here["formats"]})
                if before.get(name) != here["formats"].get(name)
            ]
            differs = f"on another machine: {', '.join(changed)}"
        raise ValueError(
            f"{self.path} was measured {differs}; run {self.command} here, or name a mode [chosen-elsewhere]"
        )

    def check_model(self, model: nn.Module) -> None:
        """Raises `ValueError` for a model with other parameters than the one that was measured."""
        if model_fingerprint(model) != self.model:
            raise ValueError(
                f"{self.path} was measured for another model than this {type(model).__name__}: names or shapes of "
                f"parameters differ; run {self.command} for this one, or name a mode [chosen-elsewhere]"
            )

    @property
    def command(self) -> str:
        """What measures again."""
        return self.made_by or "precision choose task.py:make"


def is_auto(precision: object) -> bool:
    """Whether `precision` is "auto" or "auto:PATH"."""
    return isinstance(precision, str) and (precision == AUTO or precision.startswith(f"{AUTO}:"))


def read_chosen(precision: str = AUTO) -> Chosen:
    """Returns what the file says that "auto" or "auto:PATH" names.

    Raises:
        ValueError: there is no such file, or it is none of this format; says what to run.
    """
    path = precision.partition(":")[2] or FILE
    call, run = f"Fabric(precision={precision!r})", "precision choose task.py:make (of precision-lab) writes one"
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{call}: cannot read {path} ({error.strerror}); {run} [nothing-chosen]") from None
    except ValueError as error:
        raise ValueError(f"{call}: {path} is no JSON ({error}); {run} [nothing-chosen]") from None
    try:
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']!r}, and this precision-core reads {VERSION}")
        print_ = content["fingerprint"]
        texts = (content["precision"], print_["model"], content.get("made_by", ""))
        reasons, machine = content.get("reasons", {}), print_["machine"]
        if not all(isinstance(text, str) for text in texts) or not isinstance(reasons, dict):
            raise ValueError("a value of another type")
        if not isinstance(machine, dict) or not isinstance(machine.get("formats"), dict):
            raise ValueError("a fingerprint without the machine's formats")
        if is_auto(texts[0]):
            raise ValueError("a precision that is none itself")
    except (KeyError, TypeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else f"it has {error}"
        raise ValueError(f"{call}: {path} is no choice of a precision: {what}; {run} [nothing-chosen]") from None
    return Chosen(texts[0], texts[1], machine, reasons, texts[2], str(path))


def write_chosen(chosen: Chosen, path: str | os.PathLike[str] = FILE, **more: Any) -> None:
    """Writes the file, all or nothing; `more` are further keys, for readers: plain values that nothing here reads."""
    content = {
        "version": VERSION,
        "precision": chosen.precision,
        "reasons": dict(chosen.reasons),
        "fingerprint": {"model": chosen.model, "machine": dict(chosen.machine)},
        "made_by": chosen.made_by,
    }
    temporary = Path(f"{os.fspath(path)}.new")
    temporary.write_text(json.dumps(content | more, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def model_fingerprint(model: nn.Module) -> str:
    """Returns a hash of the names and shapes of all parameters: the same before and after a cast."""
    lines = sorted(f"{name} {tuple(param.shape)}" for name, param in model.named_parameters())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def machine_fingerprint(device_type: str) -> dict[str, Any]:
    """Returns the device type, and how well it computes in each format: "native", "emulated", "slow" or "no"."""
    probes = FORMATS.get(device_type, {})
    return {"device": device_type, "formats": {dtype_name(dtype): probe()[0] for dtype, probe in probes.items()}}
