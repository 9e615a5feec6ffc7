"""What Fabric.save and Fabric.load do: the user's state, the precision's and the random generators', as one file.

A sharded strategy writes a folder instead, all ranks together; otherwise, with several processes, rank 0 writes. Each
rank's random generators and loaders' positions are in it, and no rank begins to write values into live objects before
all of them have compared theirs.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from precision_core import checkpoint, rng
from precision_core.checkpoint import RESERVED, CheckpointError
from precision_core.compare import check_fits
from precision_core.loader import DeviceLoader
from precision_core.restoring import restore
from precision_core.state import Filter, check_filter, collect, param_dtypes, select, state_of, stateful_objects
from precision_core.strategies import Strategy
from precision_core.transaction import Step
from precision_core.undo import undo_of


def save(path: Path, state: dict[str, Any], filter: Filter | None, strategy: Strategy) -> None:
    """Writes the checkpoint; see `Fabric.save`."""
    if not isinstance(state, dict) or RESERVED in state:
        raise ValueError(f"fabric.save(path, state): state is a dict without the key {RESERVED!r}")
    with _Agreement(strategy, "save") as agreement:
        content = collect(state, filter)
        loaders = {key: each.state_dict() for key, each in stateful_objects(state) if isinstance(each, DeviceLoader)}
        agreement.reach()
    mine = {"rng": rng.rng_state(strategy.device), "loaders": loaders}
    ranks = [strategy.broadcast(mine, src=rank) for rank in range(strategy.world_size)]
    header = {
        "version": checkpoint.FORMAT_VERSION,
        "policy": str(strategy.precision.policy),
        "torch": str(torch.__version__),
        "precision": strategy.precision.state_dict(),
        "param_dtypes": param_dtypes(state),
        "rng": ranks[0]["rng"],
        "ranks": ranks if len(ranks) > 1 else [],
    }
    content = {**content, RESERVED: header}
    if strategy.sharded:
        from precision_core.folder_checkpoint import write_folder  # takes seconds to import

        write_folder(path, content)  # the ranks agree in there
        return
    with _Agreement(strategy, "save") as agreement:
        if strategy.is_global_zero:
            checkpoint.write(path, content)
        agreement.reach()


def load(
    path: Path, state: dict[str, Any] | None, strict: bool, filter: Filter | None, strategy: Strategy
) -> dict[str, Any]:
    """Reads the checkpoint, into the live objects by choice; see `Fabric.load`."""
    if state is not None and not isinstance(state, dict):
        raise ValueError(f"fabric.load(path, state): state is a dict as for save, not a {type(state).__name__}")
    if state is None:
        content = _read(path, strategy)
        return copy.deepcopy({key: value for key, value in content.items() if key != RESERVED})
    with _Agreement(strategy, "load") as agreement:
        check_filter(state, filter)
        content = _read(path, strategy)
        header = content.pop(RESERVED)
        ranks = header.get("ranks") or [{"rng": header["rng"], "loaders": {}}]
        mine = ranks[strategy.global_rank] if strategy.global_rank < len(ranks) else {"rng": None, "loaders": {}}
        if len(ranks) == strategy.world_size:
            for keys, position in mine["loaders"].items():
                content = _replaced(content, keys, position)
        content = _filled_up(state, content, filter or {})
        origin = f"{path} (policy {header.get('policy')}, torch {header.get('torch')})"
        dtypes = header.get("param_dtypes")
        check_fits(state, content, strict=strict, dtypes=dtypes, origin=origin)
        host = [_precision_step(header["precision"], strategy)]
        if mine["rng"] is not None:  # a rank that the saving run did not have keeps its own
            host.insert(0, _rng_step(mine["rng"], strategy.device))
        return restore(state, content, strict=strict, dtypes=dtypes, host=host, agree=agreement.reach, origin=origin)


def _read(path: Path, strategy: Strategy) -> dict[str, Any]:
    """Returns the content of a checkpoint file, or of a folder, whatever strategy wrote it; whole on each rank."""
    if not strategy.sharded and not (path.is_dir() and any(path.iterdir())):
        return checkpoint.read(path)
    from precision_core.folder_checkpoint import read_folder

    content = read_folder(path)
    checkpoint.check_header(path, content)
    return content


def _rng_step(state: dict[str, Any], device: torch.device) -> Step:
    before = rng.rng_state(device)
    state = copy.deepcopy(state)
    return (
        "the random generators",
        partial(rng.set_rng_state, state, device),
        partial(rng.set_rng_state, before, device),
    )


def _precision_step(state: dict[str, Any], strategy: Strategy) -> Step:
    precision = strategy.precision
    return "the precision", partial(precision.load_state_dict, copy.deepcopy(state)), undo_of(precision)


def _replaced(content: Any, keys: tuple[Any, ...], value: Any) -> Any:
    """Returns `content` with `value` at `keys`; what is not there is left out."""
    if not keys:
        return value
    if not isinstance(content, dict) or keys[0] not in content:
        return content
    return {**content, keys[0]: _replaced(content[keys[0]], keys[1:], value)}


def _filled_up(tree: dict[str, Any], content: dict[str, Any], filter: Filter) -> dict[str, Any]:
    """Returns `content` with those entries of modules that `filter` says no to as they are in the live module."""
    filled = dict(content)
    for key, choose in filter.items():
        live, saved = tree[key], content.get(key)
        if isinstance(choose, dict) and isinstance(saved, dict):
            filled[key] = _filled_up(live, saved, choose)
        elif not isinstance(live, nn.Module):
            raise ValueError(f"fabric.load(filter={{{key!r}: ...}}): only of modules a part can be loaded")
        elif isinstance(saved, dict):
            kept = {name: value for name, value in state_of(live).items() if not choose(name, value)}
            filled[key] = select(saved, choose)
            filled[key].update(kept)
    return filled


class _Agreement:
    """One point that all ranks reach, each with its problem or without; where one has a problem, all raise.

    A rank that raises on its way there reaches it by leaving the context.
    """

    def __init__(self, strategy: Strategy, what: str) -> None:
        self._strategy, self._what = strategy, what
        self._reached = False

    def __enter__(self) -> _Agreement:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and not self._reached:
            self._exchange(f"{type(error).__name__}: {error}")

    def reach(self) -> None:
        """Raises `CheckpointError` if another rank has a problem."""
        problems = self._exchange("")
        found = next((rank for rank, problem in enumerate(problems) if problem), None)
        if found is not None:
            raise CheckpointError(f"rank {found} could not {self._what} the checkpoint: {problems[found]}")

    def _exchange(self, problem: str) -> list[str]:
        self._reached = True
        if self._strategy.world_size == 1:
            return []
        return [self._strategy.broadcast(problem, src=rank) for rank in range(self._strategy.world_size)]
