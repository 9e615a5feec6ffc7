"""The parameters and the optimizer's state in a DeepSpeed checkpoint, as plain state dicts of torch."""

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
    "convert it after the optimizer is set up: "
    "optimizer.load_state_dict(precision_deepspeed.consolidated_optimizer_state_dict({path!r}))"
)


def consolidated_state_dict(path: str | PathLike[str], *, trust: bool = False) -> dict[str, Tensor]:
    """Returns name -> full tensor, on the CPU, of the model in a checkpoint folder of `fabric.save`.

    Parameters are float32 (the master weights, if there are any); buffers are in their own dtype. It loads into the
    same model anywhere: `model.load_state_dict(consolidated_state_dict(path))`. Reads all ranks' files in one process.
    `trust` opens files with other objects than tensors and DeepSpeed's own, which may execute code.

    Raises:
        CheckpointError: incomplete, damaged, not a checkpoint of a DeepSpeed engine, or files with other objects in
            them.
        FileNotFoundError: there is no such folder.
    """
    folder, record = _open(path, "consolidated_state_dict")
    return _float32(Saved(folder, record, trust=trust), record)


def consolidated_optimizer_state_dict(path: str | PathLike[str], *, trust: bool = False) -> dict[str, Any]:
    """Returns the optimizer's state in a checkpoint folder as torch's optimizers have it: full tensors on the CPU.

    It loads into an optimizer of the same kind whose groups hold the same parameters in the same order:
    `optimizer.load_state_dict(consolidated_optimizer_state_dict(path))`. State is as DeepSpeed held it: float32 beside
    master weights.

    Raises:
        CheckpointError: as `consolidated_state_dict` does; state that has neither the shape of its parameter nor is a
            scalar.
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
    """Returns the state with tensors of its own: parameters in one flat tensor share a step count."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def read_plain(folder: Path, content: dict[str, Any], trust: bool) -> tuple[dict[str, Any], dict[tuple[Any, ...], str]]:
    """Returns `content` of a verified folder with models' values in place of their records, and key path -> reason.

    An optimizer's record stays as it is, and the reason says how to convert it.
    """
    why: dict[tuple[Any, ...], str] = {}

    def plain(value: Any, key_path: tuple[Any, ...]) -> Any:
        if not isinstance(value, dict):
            return value
        if value.get(_RECORD) == "model":
            return _float32(Saved(folder, value, trust=trust), value)
        if value.get(_RECORD) == "optimizer":
            why[key_path] = _CONVERT.format(path=str(folder))
            return value
        return {key: plain(each, (*key_path, key)) for key, each in value.items()}

    return plain(_less_section(content), ()), why


def _less_section(content: dict[str, Any]) -> dict[str, Any]:
    """Returns `content` without the scaler state of DeepSpeed's `fp16` section, whose rule differs from torch's."""
    header = content.get(RESERVED)  # None for `fabric.load(path)`, which leaves it out
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
        raise CheckpointError(f"{path} has no model of a DeepSpeed engine in it")
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
