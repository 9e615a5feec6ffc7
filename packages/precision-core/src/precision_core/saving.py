"""Saving: the checkpoints of a run, and a module's weights alone; the base of `Fabric`, on top of `Run`.

The code is in `checkpoint/`, which a plain `import precision_core` leaves out: the methods import it.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from precision_core.override import uncompiled
from precision_core.precision.base import Precision
from precision_core.strategies.membership import check_module
from precision_core.strategies.run import Run

if TYPE_CHECKING:
    from precision_core.checkpoint.background import PendingSave
    from precision_core.checkpoint.weights.layers import Loaded


class Saving(Run):
    """Saves and loads what a run trains; with several processes, in calls that are for all of them."""

    _precision: Precision

    def save(
        self,
        path: str | PathLike[str],
        state: dict[str, Any],
        filter: dict[str, Any] | None = None,
        *,
        wait: bool = True,
    ) -> PendingSave:
        """Writes a checkpoint, all or nothing; with several processes call it on all of them, rank 0 writes.

        `state` holds objects with `state_dict` (loaders from `setup_dataloaders` too) and plain values; dicts may nest.
        The precision's state and the random generators' are added. `filter` maps a key of `state` to
        `callable(name, value) -> bool`, which chooses the entries of that key's state dict to save:
        `filter={"model": lambda name, value: "lora" in name}`. Where `state` nests, so does `filter`.

        With `wait=False` it copies the state to CPU memory and returns, and a thread writes. `wait()` of the returned
        object raises if that failed; else the next save does.

        Raises:
            ValueError: a value that `load` would refuse, or a filter without its key; names the key. A URL
                ("s3://bucket/last.ckpt") for `path`; `~` and "file:///..." are paths.
            OSError: the file cannot be written; names the path. In both cases an old file at `path` stays.
            CheckpointError: another rank failed, exited, or went on without calling this.
        """
        from precision_core.checkpoint.background import PendingSave
        from precision_core.checkpoint.live.state import check_is_dict
        from precision_core.checkpoint.paths import local_path
        from precision_core.checkpoint.save import save

        place = local_path(path, "fabric.save")
        check_is_dict("fabric.save", state)
        self._check_launched("fabric.save")
        engines = self._strategy.checkpoint_format
        if engines is not None and engines.takes(self._strategy, state):
            engines.save(self._strategy, place, state, filter)
            return PendingSave(place)
        return save(place, state, filter, self._strategy, wait)

    def load(
        self,
        path: str | PathLike[str],
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        filter: dict[str, Any] | None = None,
        trust: bool = False,
    ) -> dict[str, Any]:
        """Reads a checkpoint, a file or a folder, verified and not executed; into `state`, all or nothing.

        With `state`, its objects, its plain values, the precision and the random generators get the saved values, and
        keys that `state` lacks are returned. If anything raises, all of them are as before; only a signal (Ctrl-C)
        while the last values are copied leaves parts of both. `filter` as for `save`, of modules only: entries that it
        says no to stay as they are. Without `state`, everything is returned and nothing is changed.
        `strict=False` allows missing keys and rounding, and warns of each object that loaded in part.
        Under a strategy that shards, tensors that `state` has no key for are not read: they are on the meta device.
        `trust=True` loads objects that a safe load refuses, and runs whatever code the checkpoint names.

        Raises:
            CheckpointError: damaged, not a checkpoint, from a newer version, or of other shapes or keys than `state`;
                names the object.
            FileNotFoundError: there is no such file.
            ValueError: a URL for `path`, or a filter without its key.
        """
        from precision_core.checkpoint.live.state import check_is_dict
        from precision_core.checkpoint.load import load
        from precision_core.checkpoint.paths import local_path
        from precision_core.checkpoint.storage.engine import folder_of, is_engines

        place = folder_of(local_path(path, "fabric.load"))
        check_is_dict("fabric.load", {} if state is None else state)
        self._check_launched("" if state is None else "fabric.load")  # without one each rank may read for itself
        engines = self._strategy.checkpoint_format
        if engines is not None and is_engines(place):
            return engines.load(self._strategy, place, state, strict, filter, trust)
        return load(place, state, strict, filter, trust, self._strategy)

    def save_module(
        self,
        path: str | PathLike[str],
        module: nn.Module,
        *,
        max_shard_size: int | str = "5GB",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes a module's parameters and buffers as safetensors, as Hugging Face libraries read and write them.

        Above `max_shard_size` (bytes, or "5GB") it writes several files and their index. All or nothing; with several
        processes call it on all of them, rank 0 writes. Needs `pip install safetensors`. `dtype` is what floating
        tensors are written in; `torch.float32` writes the master weights of modes that have them.

        Raises:
            ValueError: a tensor that safetensors cannot hold, or without values (names it); a URL for `path`; a
                `max_shard_size` that is no size; not a module.
            ImportError: safetensors is not installed.
            OSError: the file cannot be written; an old file at `path` stays.
            CheckpointError: another rank failed, exited, or went on without calling this.
        """
        from precision_core.checkpoint.agreement import agreed
        from precision_core.checkpoint.paths import local_path
        from precision_core.checkpoint.weights.files import save_module

        place = local_path(path, "fabric.save_module")
        check_module("fabric.save_module", module, "pass the model, whose state_dict is taken here, as second argument")
        target = uncompiled(module)
        self._check_launched("fabric.save_module")
        with agreed(self._strategy, "save"), self._strategy.gathered(target):
            save_module(
                place,
                target,
                max_shard_size=max_shard_size,
                dtype=dtype,
                masters=self._precision.masters,
                keep=self.is_global_zero,
            )

    def load_module(self, path: str | PathLike[str], module: nn.Module, strict: bool = True) -> Loaded:
        """Reads safetensors, memory-mapped, into a module: a file, an index file, or a folder with either.

        Layers that load in their own way, such as quantised ones, get their tensors one layer at a time. Returns the
        names that were `missing` and `unexpected`; under `strict` there are none. Where the module is sharded, call it
        on all ranks: each takes its shards, once names and shapes are right on all of them.

        Raises:
            CheckpointError: damaged, or of other names or shapes than the module, here or on another rank; nothing was
                changed.
            FileNotFoundError: there is no such file.
            ValueError: a URL for `path`, or not a module.
            ImportError: safetensors is not installed.
        """
        from precision_core.checkpoint.agreement import agreed
        from precision_core.checkpoint.paths import local_path
        from precision_core.checkpoint.shards import is_sharded
        from precision_core.checkpoint.weights.files import load_module

        place = local_path(path, "fabric.load_module")
        check_module("fabric.load_module", module, "pass the model, which is filled in place, as second argument")
        target = uncompiled(module)
        self._check_launched("fabric.load_module" if any(map(is_sharded, target.parameters())) else "")
        if any(param.is_meta for param in target.parameters()):
            self._precision.before_load(target)
        masters = self._precision.masters
        with self._strategy.gathered(target, writes=True):
            if not any(map(is_sharded, target.parameters())):
                return load_module(place, target, strict, masters=masters)
            with agreed(self._strategy, "load") as ranks:
                return load_module(place, target, strict, agree=ranks.reach, masters=masters)
