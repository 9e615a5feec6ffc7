"""`python ci/docs_tables.py`: writes the site's tables in docs/generated/ that are made from code. Needs our packages.

A test says which are not current. What mkdocs can make without torch, ci/mkdocs_hooks.py makes when the site is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from unittest.mock import patch

import torch

from precision_core import ALIASES, MODES, Policy
from precision_core import hardware as core
from precision_core.errors import CODES
from precision_core.policy import dtype_name
from precision_core.strategies import STRATEGIES
from precision_core.support import PLUGINS, names, refusal, resolve_precision, resolve_strategy
from precision_core.support import STRATEGIES as GROUP

FOLDER = Path(__file__).parents[1] / "docs" / "generated"


def rows(*lines: Iterable[object]) -> str:
    """Returns lines as a Markdown table, the first one being its head."""
    head, *rest = [[str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest]) + "\n"


# -------------------------------------------------------------------- modes


def _shown(value: object) -> str:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return {None: "none", True: "yes", False: "no"}.get(value, str(value))  # type: ignore[call-overload]


def modes() -> str:
    """Which dtype each mode has for what training keeps: every field of its policy."""
    columns = [field.name for field in fields(Policy) if field.name != "exceptions"]
    lines = []
    for mode, policy in MODES.items():
        spelled = sorted({str(alias) for alias, meant in ALIASES.items() if meant == mode})
        name = f"`{mode}`" + (f" ({', '.join(f'`{each}`' for each in spelled)})" if spelled else "")
        lines.append([name, *(_shown(getattr(policy, column)) for column in columns)])
    return rows(["mode", *columns], *lines)


# -------------------------------------------------------------------- devices

MACHINES: dict[str, tuple[str, dict[str, object]]] = {
    "CPU without bfloat16 units": ("cpu", {"avx512_bf16": False, "amx": False, "fp16": False}),
    "CPU with AVX512-BF16 or AMX": ("cpu", {"avx512_bf16": True, "amx": True, "fp16": False}),
    "CPU with float16 units too": ("cpu", {"avx512_bf16": True, "amx": True, "fp16": True}),
    "ARM CPU with bfloat16 instructions, Linux": ("cpu", {"machine": "aarch64", "onednn_bf16": True}),
    "Apple's CPU": ("cpu", {"machine": "arm64", "system": "Darwin", "onednn_bf16": False}),
    "NVIDIA, Pascal (6.x)": ("cuda", {"capability": (6, 1)}),
    "NVIDIA, Volta and Turing (7.x)": ("cuda", {"capability": (7, 5)}),
    "NVIDIA, Ampere and newer (8.0 on)": ("cuda", {"capability": (8, 0)}),
    "Apple's GPU, macOS 14 and newer": ("mps", {"macos14": True}),
    "Apple's GPU, older macOS": ("mps", {"macos14": False}),
}
"""Kind of machine -> device type, and what the probes of `precision_core.hardware` find there."""


def _as_on(machine: dict[str, object]) -> ExitStack:
    """Context in which the probes answer as on that machine."""
    answers: dict[str, Callable[..., object]] = {
        "precision_core.hardware.is_available": lambda device_type: True,
        "precision_core.hardware.compute_capability": lambda: machine.get("capability", (0, 0)),
        "precision_core.hardware._onednn": lambda question: bool(
            machine.get("onednn_bf16", True) if "bf16" in question else machine.get("fp16")
        ),
        "precision_core.hardware.platform.machine": lambda: machine.get("machine", "x86_64"),
        "precision_core.hardware.platform.system": lambda: machine.get("system", "Linux"),
        "torch.cpu._is_avx512_bf16_supported": lambda: machine.get("avx512_bf16", False),
        "torch.cpu._is_amx_tile_supported": lambda: machine.get("amx", False),
        "torch.backends.mps.is_macos_or_newer": lambda *version: machine.get("macos14", False),
    }
    stack = ExitStack()
    for name, answer in answers.items():
        stack.enter_context(patch(name, answer))
    stack.enter_context(patch.object(torch.version, "hip", None))
    return stack


def devices() -> str:
    """How well each kind of machine computes in each of core's modes."""
    lines = []
    for name, (device, machine) in MACHINES.items():
        with _as_on(machine):
            lines.append([name, *(core.by_dtypes(policy, device)[0] for policy in MODES.values())])
    return rows(["", *(f"`{mode}`" for mode in MODES)], *lines)


# -------------------------------------------------------------------- pairs


def pairs() -> str:
    """Which mode runs under which strategy, and why the others do not."""
    strategies = [*STRATEGIES, *names(GROUP)]
    modes = [*MODES, *(mode for mode in names(PLUGINS) if mode != "transformer-engine")]  # asks for the vendor first
    reasons: list[str] = []
    lines = []
    with ExitStack() as stack:
        for question in ("support.cpu_has_float16", "plugin.supports_float16"):  # where the device has float16
            stack.enter_context(patch(f"precision_deepspeed.{question}", lambda: True))
        for mode in modes:
            cells = [f"`{mode}`"]
            for strategy in strategies:
                reason = _refused(mode, strategy)
                if reason and reason not in reasons:
                    reasons.append(reason)
                cells.append(f"no ({reasons.index(reason) + 1})" if reason else "yes")
            lines.append(cells)
    notes = "\n".join(f"{number}. {reason}." for number, reason in enumerate(reasons, 1))
    return rows(["mode", *(f"`{name}`" for name in strategies)], *lines) + "\n" + notes + "\n"


def _refused(mode: str, strategy: str) -> str | None:
    under = resolve_strategy(strategy, "cpu", "auto", 1)[0]
    try:
        return refusal(resolve_precision(mode, under), under)
    except ValueError as error:  # the engine's own plugin has no such mode
        return str(error)


def errors() -> str:
    """Each code with its one line."""
    return rows(["code", "what happened"], *([f"[{code}](#{code})", line] for code, line in CODES.items()))


TABLES: dict[str, Callable[[], str]] = {
    "modes.md": modes,
    "devices.md": devices,
    "pairs.md": pairs,
    "errors.md": errors,
}
"""File in docs/generated -> what writes it."""


def main() -> None:
    for name, make in TABLES.items():
        (FOLDER / name).write_text(make())


if __name__ == "__main__":
    main()
