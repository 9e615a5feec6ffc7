"""The parameters of a DeepSpeed checkpoint as one plain float32 state dict, for anybody without DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from precision_core import checkpoint, folder_manifest
from precision_core.checkpoint import CheckpointError
from precision_core.local_path import local_path
from precision_deepspeed.saved import Saved

_STATE, _RECORD = "state.ckpt", "deepspeed"


def consolidated_state_dict(path: str | PathLike[str], *, trust: bool = False) -> dict[str, Tensor]:
    """Returns name -> value of the model in a checkpoint folder of `fabric.save`, on the CPU, whole.

    Parameters are float32, the master weights where there are any; buffers are in their own dtype. It loads into the
    same model anywhere: `model.load_state_dict(consolidated_state_dict(path))`. Reads all ranks' files in one process.
    `trust` opens files that hold more than DeepSpeed's own classes.

    Raises:
        CheckpointError: torn, damaged, no checkpoint of a DeepSpeed engine, or pickles with anything else in them.
        FileNotFoundError: there is no such folder.
    """
    folder = folder_manifest.find(local_path(path, "consolidated_state_dict").absolute())
    manifest = folder_manifest.read(folder)
    folder_manifest.verify(folder, manifest, sorted(manifest.files))
    record = None
    if _STATE in manifest.files:
        record = next(_models(checkpoint.read(folder / _STATE)), None)
    if record is None:
        raise CheckpointError(f"{path} holds no model of a DeepSpeed engine")
    return read_consolidated(folder, record, trust=trust)


def read_consolidated(folder: Path, record: dict[str, Any], *, trust: bool = False) -> dict[str, Tensor]:
    """Returns the state dict from files that were verified; `record` says what wrote them."""
    parameters = {*record["shapes"], *record["tied"]}
    values = Saved(folder, record, trust=trust).module()
    return {name: value.float() if name in parameters else value for name, value in values.items()}


def _models(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        if content.get(_RECORD) == "model":
            yield content
        else:
            for value in content.values():
                yield from _models(value)
