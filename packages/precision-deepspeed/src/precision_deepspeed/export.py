"""The parameters of a DeepSpeed checkpoint as one plain float32 state dict, for anybody without DeepSpeed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precision_core import checkpoint, folder_manifest
from precision_core.checkpoint import CheckpointError
from precision_deepspeed.pickles import check_pickles

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
    folder = folder_manifest.find(Path(path).absolute())
    manifest = folder_manifest.read(folder)
    folder_manifest.verify(folder, manifest, sorted(manifest.files))
    record = None
    if _STATE in manifest.files:
        record = next(_models(checkpoint.read(folder / _STATE)), None)
    if record is None:
        raise CheckpointError(f"{path} holds no model of a DeepSpeed engine")
    if not trust:
        check_pickles(folder / name for name in manifest.files if name.endswith(".pt"))
    return read_consolidated(folder, record)


def read_consolidated(folder: Path, record: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the state dict from files that were checked; `record` says what wrote them."""
    values = _masters(folder) if record["stage"] > 0 else {}
    if record["stage"] < 3:
        content = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)
        values = {**content["module"], **values}  # DeepSpeed's own function leaves frozen ones out at stage 1
        values |= _unsharded_masters(content, values, record)
    return {name: value.detach().float() if name in record["shapes"] else value for name, value in values.items()}


def _masters(folder: Path) -> dict[str, Tensor]:
    """Returns what DeepSpeed's `zero_to_fp32` makes of the shards, and keeps what it prints to itself."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()):
        found: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    return {name: value.detach().clone() for name, value in found.items()}


def _unsharded_masters(content: dict[str, Any], values: dict[str, Tensor], record: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the master weights that stage 0 keeps for bfloat16 parameters, also by their tied names."""
    masters: dict[str, Tensor] = {}
    groups = (content["optimizer"] or {}).get("fp32_groups", ())
    for names, group in zip(record["groups"], groups, strict=False):
        for name, master in zip(names, group, strict=True):
            masters |= {other: master for other, value in values.items() if _same(value, values[name])}
    return masters


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.numel() > 0


def _models(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        if content.get(_RECORD) == "model":
            yield content
        else:
            for value in content.values():
                yield from _models(value)
