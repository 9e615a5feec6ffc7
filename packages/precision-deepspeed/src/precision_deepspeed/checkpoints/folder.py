"""fabric.save and fabric.load where the model is an engine's: a folder with DeepSpeed's own files, and core's file.

    manifest.json       every file with its size and checksum, written last: a folder without it is incomplete
    state.ckpt          everything else that was saved, the precision and the random generators, as core writes them
    *_states.pt         what `engine.save_checkpoint` writes: all ranks' parameters and optimizer state

DeepSpeed takes the folder for a tag in its parent folder: `engine.load_checkpoint(parent, tag=name)` reads it, and so
does `zero_to_fp32`. In `state.ckpt` model and optimizer are placeholders that describe the files; to load them, the
engine loads the files.
"""

from __future__ import annotations

import functools
import glob
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precision_core.checkpoint import CheckpointError, Filter, new_folder, together
from precision_core.checkpoint import file as checkpoint
from precision_core.checkpoint import load as loading
from precision_core.checkpoint import manifest as folder_manifest
from precision_core.checkpoint import save as saving
from precision_deepspeed.checkpoints.export import read_plain
from precision_deepspeed.checkpoints.pickles import check_pickles
from precision_deepspeed.checkpoints.saved import Saved

if TYPE_CHECKING:
    from precision_deepspeed.engine import Engine
    from precision_deepspeed.strategy import DeepSpeedStrategy

STATE = "state.ckpt"
RECORD = "deepspeed"
CONVERTED = ("world_size", "stage")
"""What may differ between the run that saved and the one that loads."""

_log = logging.getLogger(__name__)


@dataclass
class Placeholder:
    """Placeholder in a state for the model or optimizer of an engine; loading the model's has the engine load both."""

    what: str
    record: dict[str, Any]
    load: Callable[[], None] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the description of the engine that wrote the files."""
        return {RECORD: self.what, **self.record}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Has the engine load the files, once, for model and optimizer."""
        if self.what == "model" and self.load is not None:
            self.load()
            self.load = None


def save(path: Path, state: dict[str, Any], filter: Filter | None, strategy: DeepSpeedStrategy, engine: Engine) -> None:
    """Writes the folder, all ranks together; an older one is replaced when every rank is done.

    Raises:
        ValueError: the model without its optimizer or the reverse, a filter on them, another file or folder at `path`.
        CheckpointError: another rank failed; a path that DeepSpeed takes for a pattern.
    """
    path = path.absolute()
    with together(None):
        _check_name(path)
        placeholders = _placeholders(state, engine, strategy)
        _check_both(state, placeholders, filter)
    with new_folder(path, str(strategy.precision.policy), None) as (temporary, written):
        engine.save(temporary / "engine", "tag")
        saving.save(temporary / STATE, placeholders, filter, strategy)
        with together(None):
            if strategy.group.is_rank_zero:
                for file in (temporary / "engine" / "tag").iterdir():
                    os.rename(file, temporary / file.name)
                shutil.rmtree(temporary / "engine")
                written.update((file.name, folder_manifest.digest(file)) for file in temporary.iterdir())


def load(
    path: Path,
    state: dict[str, Any] | None,
    strict: bool,
    filter: Filter | None,
    trust: bool,
    strategy: DeepSpeedStrategy,
    engine: Engine | None,
) -> dict[str, Any]:
    """Reads the folder, into live objects if `state` has them; see `Fabric.load`. If it raises, nothing has changed.

    Raises:
        CheckpointError: incomplete, damaged, or written in another mode, by another model or optimizer; files with
            other objects than tensors and DeepSpeed's own.
    """
    with together(None):
        if state is not None:
            _check_name(path.absolute())
        folder = folder_manifest.find(path.absolute())
        manifest = folder_manifest.read(folder)
        folder_manifest.verify(folder, manifest, sorted(manifest.files))
        if not trust:
            check_pickles(folder / name for name in manifest.files if name.endswith(".pt"))
    if state is None:
        content = loading.load(folder / STATE, None, strict, filter, trust, strategy)
        return read_plain(folder, content, trust)[0]
    if engine is None:
        raise CheckpointError(
            f"{path} has a model in DeepSpeed's shards, and no model was set up with an optimizer here: call "
            "fabric.setup(model, optimizer) first, or read the values with "
            "precision_deepspeed.consolidated_state_dict(path)"
        )
    placeholders = _placeholders(state, engine, strategy)
    with together(None):
        if engine.has_gradients:
            raise CheckpointError(
                "fabric.load between fabric.backward and optimizer.step(): step first, or call optimizer.zero_grad()"
            )
        saved = _compare(path, checkpoint.read(folder / STATE), placeholders)
        mine = _record(engine, strategy)
        differing = [f"{name} {saved[name]} -> {mine[name]}" for name in CONVERTED if saved[name] != mine[name]]
        write: Callable[[], None] = functools.partial(engine.load, folder)
        if differing:
            write = engine.adopt(Saved(folder, saved, trust=trust))
    for _, placeholder in _each(placeholders):
        placeholder.load = write
    rest = loading.load(folder / STATE, placeholders, strict, filter, trust, strategy)
    _copy_plain(state, placeholders)
    strategy.converted = ", ".join(differing)
    if differing and strategy.group.is_rank_zero:
        _log.info("%s was converted: %s", path, strategy.converted)
    return rest


def _check_name(path: Path) -> None:
    if glob.has_magic(str(path)):
        raise CheckpointError(
            f"{path}: DeepSpeed takes *, ? and [ in a path for a pattern, and would not find its files again: choose a "
            "path without them"
        )


def _record(engine: Engine, strategy: DeepSpeedStrategy) -> dict[str, Any]:
    """Returns the description of an engine that reading its files requires."""
    return {
        "world_size": strategy.group.world_size,
        "stage": strategy.stage,
        "mode": strategy.precision.mode,
        "master": str(strategy.precision.policy.master),
        "optimizer": type(engine.optimizer).__name__,
        **engine.names,
    }


def _placeholders(state: dict[str, Any], engine: Engine, strategy: DeepSpeedStrategy) -> dict[str, Any]:
    """Returns a copy of `state` and its dicts, with placeholders for the engine's model and optimizer."""
    made: dict[str, Any] = {}
    for key, value in state.items():
        if type(value) is dict:
            made[key] = _placeholders(value, engine, strategy)
        elif engine.holds(value):
            what = "optimizer" if value is engine.optimizer else "model"
            made[key] = Placeholder(what, _record(engine, strategy))
        else:
            made[key] = value
    return made


def _each(tree: dict[str, Any]) -> Iterator[tuple[str, Placeholder]]:
    for key, value in tree.items():
        if type(value) is dict:
            yield from _each(value)
        elif isinstance(value, Placeholder):
            yield key, value


def _check_both(state: dict[str, Any], placeholders: dict[str, Any], filter: Filter | None) -> None:
    there = {placeholder.what: key for key, placeholder in _each(placeholders)}
    if there.keys() != {"model", "optimizer"}:
        raise ValueError(
            "fabric.save under DeepSpeed: the engine saves model and optimizer together, and the state has only "
            f"{sorted(there)}: save both, {{'model': model, 'optimizer': optimizer, ...}}"
        )
    for key in there.values():
        if filter and key in filter:
            raise ValueError(
                f"fabric.save(filter={{{key!r}: ...}}): DeepSpeed's engine saves all of it; leave that out"
            )


def _compare(path: Path, content: dict[str, Any], placeholders: dict[str, Any]) -> dict[str, Any]:
    """Returns the record in `content` after comparing it with the engine's; CONVERTED may differ."""
    saved = list(_records(content))
    for key, placeholder in _each(placeholders):
        found = next((record for record in saved if record[RECORD] == placeholder.what), None)
        if found is None:
            raise CheckpointError(f"{path} has no {placeholder.what} for {key!r}")
        for name, mine in placeholder.record.items():
            if name not in CONVERTED and found.get(name) != mine:
                raise CheckpointError(
                    f"{path} was written with {name}={_short(found.get(name))}, and this run has "
                    f"{name}={_short(mine)}. The number of ranks and the stage may differ, the mode, the model and the "
                    "optimizer may not; precision_deepspeed.consolidated_state_dict(path) reads the float32 parameters "
                    "for any"
                )
    return saved[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _records(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        if RECORD in content:
            yield content
        else:
            for value in content.values():
                yield from _records(value)


def _copy_plain(state: dict[str, Any], placeholders: dict[str, Any]) -> None:
    """Copies the plain values that were loaded beside the placeholders into the user's own dicts."""
    for key, value in placeholders.items():
        if type(value) is dict and type(state.get(key)) is dict:
            _copy_plain(state[key], value)
        elif not isinstance(value, Placeholder):
            state[key] = value
