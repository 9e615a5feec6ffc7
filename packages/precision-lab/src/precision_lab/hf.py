"""`precision estimate --hf`: the task that a Hugging Face config.json stands for, without a file of weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from precision_lab.task import Task


def hf_maker(config: Path, batch: str) -> Callable[[], Task]:
    """Returns what makes the causal language model of a config.json, with AdamW and batches of that size.

    Raises:
        ValueError: no such file, no batch, or transformers does not know the model.
        ImportError: transformers is not installed.
    """
    shape = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", batch)
    if shape is None:
        raise ValueError(f"batch {batch!r}: expected sequences x tokens, 4x2048")
    known = _config(config / "config.json" if config.is_dir() else config)
    from transformers import AutoModelForCausalLM

    sequences, tokens = map(int, shape.groups())

    def make() -> Task:
        model = AutoModelForCausalLM.from_config(known)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

        def batches(seed: int) -> Any:
            while True:
                ids = torch.zeros(sequences, tokens, dtype=torch.int64)
                yield {"input_ids": ids, "labels": ids}

        return Task(model, optimizer, batches)

    return make


def _config(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind is None:
        raise ValueError(f'{path} has no "model_type": expected the config.json of a Hugging Face model')
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, __version__

    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{path}: transformers {__version__} knows no model_type {kind!r}")
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{path}: {kind!r} is no causal language model: make it in a task, precision new task.py")
    for key in (
        "model_type",
        "dtype",
        "torch_dtype",
    ):  # of the file's weights: which dtype they train in, the mode says
        settings.pop(key, None)
    return AutoConfig.for_model(kind, **settings)
