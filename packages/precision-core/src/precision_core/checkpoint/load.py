"""What Fabric.load does: reads a checkpoint into CPU memory, compares it, agrees over ranks, writes the live objects.

No rank writes into live objects before all ranks have compared theirs. No collective runs in between, so that an
error on one rank is an error on all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.checkpoint.agreement import agreed
from precision_core.checkpoint.background import settle
from precision_core.checkpoint.error import RESERVED
from precision_core.checkpoint.live import left_out
from precision_core.checkpoint.live.alignment import aligned, replaced
from precision_core.checkpoint.live.compare import check_matches, raise_mismatches
from precision_core.checkpoint.live.masters import translated
from precision_core.checkpoint.live.optimizer_state import indexed_params
from precision_core.checkpoint.live.restore import restore
from precision_core.checkpoint.live.state import Filter, check_filter, is_plain, saved_objects, select, state_of
from precision_core.checkpoint.live.transaction import Step
from precision_core.checkpoint.live.undo import undo_of
from precision_core.checkpoint.shards import is_sharded
from precision_core.checkpoint.storage.source import open_checkpoint
from precision_core.checkpoint.tree import KeyPath, paths
from precision_core.data import rng
from precision_core.data.loader import DeviceLoader
from precision_core.strategies import Strategy

_NEW_RANK: dict[str, Any] = {"rng": None, "loaders": {}}


def load(
    path: Path, state: dict[str, Any] | None, strict: bool, filter: Filter | None, trust: bool, strategy: Strategy
) -> dict[str, Any]:
    """Reads the checkpoint, into the live objects in `state` unless that is None; see `Fabric.load`."""
    settle(strategy)
    if state is None:
        return open_checkpoint(path, trust).everything()
    all_ranks = agreed(strategy, "load")
    with all_ranks:
        check_filter(state, filter)
        source = open_checkpoint(path, trust)
        content = dict(source.content)
        header = content.pop(RESERVED)
        mine = _of_rank(header, strategy)
        for keys, position in mine["loaders"].items():
            content = replaced(content, keys, position)
        content = _filled_up(state, content, filter or {})
        origin = f"{path} (policy {header.get('policy')}, torch {header.get('torch')})"
        raise_mismatches(origin, _refused(state, content, source.refused))
        content, dtypes, problems, notes = aligned(state, content, header, strict=strict)
        masters, state_dtype = strategy.precision.masters, strategy.precision.state_dtype
        fit = translated(state, content, header, masters, values=False)
        raise_mismatches(origin, [f"{fit.loss}; strict=False drops them"] if fit.loss and strict else [])
        check_matches(state, fit.content, strict=strict, dtypes=dtypes, state_dtype=state_dtype, origin=origin)
        raise_mismatches(origin, problems)
        if fit.loss:
            notes.append(f"dropped in loading: {fit.loss}")
    with all_ranks:
        source.verify(strategy.group.rank, strategy.group.world_size)
    with all_ranks:
        run_state = source.fetch({"rng": mine["rng"], "precision": header["precision"]})
        shards = _shardings(state, content)
        is_lean = strategy.sharded or bool(shards)
        content = source.fetch(
            content, shards, leave=lambda key_path: is_lean and not _has_destination(state, key_path)
        )
    with all_ranks:
        content, beside, _, beyond = translated(state, content, header, masters, values=True)
        raise_mismatches(origin, [f"{name}: weights beyond 65,504, the largest float16" for name in beyond])
        steps = [_precision_step(run_state["precision"], notes, strategy)]
        if run_state["rng"] is not None:  # a rank that the saving run did not have keeps its own
            steps.insert(0, _rng_step(run_state["rng"], strategy.device))
        warn = partial(left_out.warn, path) if strategy.group.is_rank_zero else (lambda _: None)
        reach = all_ranks.reach
        rest = restore(
            state,
            content,
            strict=strict,
            dtypes=dtypes,
            state_dtype=state_dtype,
            run_steps=steps,
            agree=reach,
            warn=warn,
            origin=origin,
        )
        for param, kept in beside:
            masters.keep(param, kept)
        return rest


def _of_rank(header: dict[str, Any], strategy: Strategy) -> dict[str, Any]:
    """Returns this rank's random generators and loader positions; the latter only if as many ranks saved."""
    ranks = header.get("ranks") or [{"rng": header["rng"], "loaders": {}}]
    mine = ranks[strategy.group.rank] if strategy.group.rank < len(ranks) else _NEW_RANK
    return mine if len(ranks) == strategy.group.world_size else {**mine, "loaders": {}}


def _has_destination(tree: Any, key_path: tuple[Any, ...]) -> bool:
    """Whether an object or a plain value in `tree` takes the value at `key_path`."""
    for depth, key in enumerate(key_path):
        if type(tree) is not dict:
            return True
        if key not in tree:
            return depth > 0 and is_plain(tree)  # a dict of plain values takes all there are
        tree = tree[key]
    return True


def _shardings(tree: dict[str, Any], content: dict[str, Any]) -> dict[KeyPath, Tensor]:
    """Returns the live DTensor whose sharding each tensor in `content` takes, by key path; others load unsharded.

    State that an optimizer does not have yet takes its parameter's.
    """
    found: dict[KeyPath, Tensor] = {}
    for path, live, state in saved_objects(tree, content):
        if isinstance(live, DeviceLoader):
            continue
        saved = dict(paths(state, lambda tensor: True))
        sharded = dict(paths(state_of(live), is_sharded))
        if isinstance(live, Optimizer) and any(is_sharded(p) for group in live.param_groups for p in group["params"]):
            params = dict(indexed_params(live, state))
            of_params = {key_path: params.get(key_path[1]) for key_path in saved if key_path[0] == "state"}
            sharded = {p: param for p, param in of_params.items() if param is not None and is_sharded(param)} | sharded
        for key_path, tensor in saved.items():
            if key_path in sharded and sharded[key_path].shape == tensor.shape:
                found[(*path, *key_path)] = sharded[key_path]
    return found


def _rng_step(state: dict[str, Any], device: torch.device) -> Step:
    before = rng.rng_state(device)
    state = copy.deepcopy(state)
    return (
        "the random generators",
        partial(rng.set_rng_state, state, device),
        partial(rng.set_rng_state, before, device),
    )


def _precision_step(state: dict[str, Any], notes: list[str], strategy: Strategy) -> Step:
    precision, state = strategy.precision, copy.deepcopy(state)

    def act() -> None:
        precision.load_state_dict(state)
        new = tuple(note for note in notes if note not in precision.report.notes)
        precision.report = replace(precision.report, notes=(*precision.report.notes, *new))

    return "the precision", act, undo_of(precision)


def _filled_up(tree: dict[str, Any], content: dict[str, Any], filter: Filter) -> dict[str, Any]:
    """Returns `content`, with the live module's values for the entries that `filter` rejects."""
    filled = dict(content)
    for key, choose in filter.items():
        live, saved = tree[key], content.get(key)
        if isinstance(choose, dict) and isinstance(saved, dict):
            filled[key] = _filled_up(live, saved, choose)
        elif not isinstance(live, nn.Module):
            raise ValueError(f"fabric.load(filter={{{key!r}: ...}}): only modules can be loaded in part")
        elif isinstance(saved, dict):
            kept = {name: value for name, value in state_of(live).items() if not choose(name, value)}
            filled[key] = select(saved, choose)
            filled[key].update(kept)
    return filled


def _refused(tree: dict[str, Any], content: dict[str, Any], why: Mapping[KeyPath, str]) -> list[str]:
    """Returns a problem for each object in `tree` whose values no strategy can read."""
    return [f"{'.'.join(map(str, path))}: {why[path]}" for path, _, _ in saved_objects(tree, content) if path in why]
