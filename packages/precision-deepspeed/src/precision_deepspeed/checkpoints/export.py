"""The parameters of a DeepSpeed checkpoint, and the optimizer's state, as plain state dicts for anybody else."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from precision_core.checkpoint import RESERVED, CheckpointError, local_path
from precision_core.checkpoint import file as checkpoint
from precision_core.checkpoint import manifest as folder_manifest
from precision_deepspeed.checkpoints.saved import Saved

_STATE, _RECORD = "state.ckpt", "deepspeed"

_CONVERT = (
    "DeepSpeed's engine wrote its state in shards, which other strategies do not load. Leave it out of `state`, and "
    "convert it where the optimizer is set up: "
    "optimizer.load_state_dict(precision_deepspeed.consolidated_optimizer_state_dict({path!r}))"
)


def consolidated_state_dict(path: str | PathLike[str], *, trust: bool = False) -> dict[str, Tensor]:
    """Returns name -> value of the model in a checkpoint folder of `fabric.save`, on the CPU, whole.

    Parameters are float32, the master weights where there are any; buffers are in their own dtype. It loads into the
    same model anywhere: `model.load_state_dict(consolidated_state_dict(path))`. Reads all ranks' files in one process.
    `trust` opens files that hold more than DeepSpeed's own classes.

    Raises:
        CheckpointError: torn, damaged, no checkpoint of a DeepSpeed engine, or pickles with anything else in them.
        FileNotFoundError: there is no such folder.
    """
    folder, record = _open(path, "consolidated_state_dict")
    return _float32(Saved(folder, record, trust=trust), record)


def consolidated_optimizer_state_dict(path: str | PathLike[str], *, trust: bool = False) -> dict[str, Any]:
    """Returns the optimizer's state in a checkpoint folder as torch's optimizers have it, on the CPU, whole.

    It loads into an optimizer of the same kind whose groups hold the same parameters in the same order:
    `optimizer.load_state_dict(consolidated_optimizer_state_dict(path))`. State is as DeepSpeed held it: float32 beside
    master weights.

    Raises:
        CheckpointError: as `consolidated_state_dict` does; state that is not one number an element, nor one for all.
        FileNotFoundError: there is no such folder.
    """
    folder, record = _open(path, "consolidated_optimizer_state_dict")
    saved = Saved(folder, record, trust=trust)
    numbers = {name: number for number, name in enumerate(name for group in record["groups"] for name in group)}
    groups = [
        {**{key: value for key, value in group.items() if key != "param_names"}, "params": [numbers[n] for n in names]}
        for group, names in zip(saved.groups, record["groups"], strict=True)
    ]
    states = {numbers[name]: _owned(state) for name in saved.trained if (state := saved.state(name))}
    return {"state": states, "param_groups": groups}


def _owned(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state with tensors that nobody shares: parameters of one flat tensor have one step count."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def read_plain(folder: Path, content: dict[str, Any], trust: bool) -> tuple[dict[str, Any], dict[tuple[Any, ...], str]]:
    """Returns `content` of a verified folder with values in place of models' records, and why optimizers have none.

    An optimizer's record stays as it is, and so does everything else.
    """
    why: dict[tuple[Any, ...], str] = {}

    def plain(value: Any, place: tuple[Any, ...]) -> Any:
        if not isinstance(value, dict):
            return value
        if value.get(_RECORD) == "model":
            return _float32(Saved(folder, value, trust=trust), value)
        if value.get(_RECORD) == "optimizer":
            why[place] = _CONVERT.format(path=str(folder))
            return value
        return {key: plain(each, (*place, key)) for key, each in value.items()}

    return plain(_less_section(content), ()), why


def _less_section(content: dict[str, Any]) -> dict[str, Any]:
    """Returns `content` without the state of DeepSpeed's `fp16` section, whose scale moves by a rule of its own."""
    header = content.get(RESERVED)  # which `fabric.load(path)` has left out
    if header is None or "hysteresis" not in header["precision"].get("scaler", {}):
        return content
    return {**content, RESERVED: {**header, "precision": {**header["precision"], "scaler": {}}}}


def _open(path: str | PathLike[str], call: str) -> tuple[Path, dict[str, Any]]:
    """Returns the verified folder and the record of its model."""
    folder = folder_manifest.find(local_path(path, call).absolute())
    manifest = folder_manifest.read(folder)
    folder_manifest.verify(folder, manifest, sorted(manifest.files))
    record = None
    if _STATE in manifest.files:
        record = next(_models(checkpoint.read(folder / _STATE)), None)
    if record is None:
        raise CheckpointError(f"{path} holds no model of a DeepSpeed engine")
    return folder, record


def _float32(saved: Saved, record: dict[str, Any]) -> dict[str, Tensor]:
    parameters = {*record["shapes"], *record["tied"]}
    values = {name: value.detach() if isinstance(value, Tensor) else value for name, value in saved.module().items()}
    return {name: value.float() if name in parameters else value for name, value in values.items()}


def _models(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        if content.get(_RECORD) == "model":
            yield content
        else:
            for value in content.values():
                yield from _models(value)
