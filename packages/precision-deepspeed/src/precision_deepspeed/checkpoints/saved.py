"""The values in a checkpoint folder as full tensors by parameter, for any stage and number of ranks.

DeepSpeed's optimizers hold flat tensors, of which each rank has a part. The position of a parameter in them:

    stage 0       each flat tensor is a parameter
    stages 1, 2   in `param_slice_mappings` of each rank's file
    stage 3       parameters follow each other, 1/ranks of each on every rank, rounded up

DeepSpeed's own way between numbers of ranks (0.19.8: `deepspeed.checkpoint.ds_to_universal`, then `load_universal`) is
not used: it opens every file with plain pickle, writes a second copy of the checkpoint, does not support stage 0, and
needs a record that stages 1 and 2 do not write.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from precision_core.checkpoint import CheckpointError
from precision_deepspeed.checkpoints.pickles import open_pickle


class Piece(NamedTuple):
    """A part of a parameter: `numel` elements of flat tensor number `flat` of `rank`, from `start` on."""

    rank: int
    flat: int
    start: int
    numel: int


class Saved:
    """Reads a folder whose files match their checksums; `record` is that of the model in `state.ckpt`.

    Args:
        trust: open files with other objects than tensors and DeepSpeed's own, which may execute code.

    Raises:
        CheckpointError: files with other objects in them, or in a layout that is not supported.
    """

    def __init__(self, folder: Path, record: dict[str, Any], *, trust: bool = False) -> None:
        self.folder, self.record, self._trust = folder, record, trust
        frozen = set(record["frozen"])
        self.trained = [name for group in record["groups"] for name in group if name not in frozen]
        self.groups: list[dict[str, Any]] = []
        """The optimizer's groups without their parameters: learning rates and so on."""
        self._pieces: dict[str, list[Piece]] = {name: [] for name in self.trained}
        self._masters: list[list[Tensor]] = []
        self._states: list[dict[int, dict[str, Any]]] = []
        ranks = range(record["world_size"])
        if record["stage"] == 3:
            self._models = [self._open(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt") for rank in ranks]
        else:
            self._models = [self._open("mp_rank_00_model_states.pt")]
        {0: self._read_unsharded, 1: self._read_slices, 2: self._read_slices, 3: self._read_shares}[record["stage"]]()

    def _open(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = open_pickle(self.folder / name, trust=self._trust)
        return content

    def _open_shards(self) -> list[dict[str, Any]]:
        zero = self._models[0]["ds_config"]["zero_optimization"]
        for key in ("round_robin_gradients", "elastic_checkpoint"):
            if zero.get(key):
                raise CheckpointError(f'{self.folder} was written with config["zero_optimization"]["{key}"], whose '
                                      "order of shards is not supported: load it with the stage and the number of "
                                      "ranks that saved it")  # fmt: skip
        ranks = range(self.record["world_size"])
        names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in ranks]
        prefix = "" if (self.folder / names[0]).exists() else "bf16_"
        return [self._open(prefix + name)["optimizer_state_dict"] for name in names]

    # ---------------------------------------------------------------- layouts

    def _read_unsharded(self) -> None:
        content = self._models[0]
        base, names = content["optimizer"], [name for group in self.record["groups"] for name in group]
        if "fp32_groups" in base:
            names = self.trained
            masters = [master for group in base["fp32_groups"] for master in group]
            base = base["optimizer_state_dict"]
        else:
            masters = [content["module"][name] for name in names]
        self._add(masters, base)
        for index, name in enumerate(names):
            if name in self._pieces:
                self._pieces[name].append(Piece(0, index, 0, masters[index].numel()))

    def _read_slices(self) -> None:
        for rank, shard in enumerate(self._open_shards()):
            self._add(shard["single_partition_of_fp32_groups"], shard["base_optimizer_state"])
            for flat, slices in enumerate(shard["param_slice_mappings"]):
                for name, address in slices.items():
                    self._pieces[name].append(Piece(rank, flat, address.start, address.numel))

    def _read_shares(self) -> None:
        for shard in self._open_shards():
            self._add(shard["fp32_flat_groups"], shard["optimizer_state_dict"])
        flat = start = 0
        for name in (name for shapes in self._models[0]["param_shapes"] for name in shapes):
            numel = math.ceil(self._numel(name) / len(self._masters))
            while start + numel > self._masters[0][flat].numel():
                flat, start = flat + 1, 0
            self._pieces[name] = [Piece(rank, flat, start, numel) for rank in range(len(self._masters))]
            start += numel

    def _add(self, masters: list[Tensor], base: dict[str, Any]) -> None:
        self._masters.append(masters)
        self._states.append(base["state"])
        self.groups = [
            {key: value for key, value in group.items() if key != "params"} for group in base["param_groups"]
        ]

    # ---------------------------------------------------------------- values

    def master(self, name: str) -> Tensor:
        """Returns the master weights of a parameter that trains, in its shape and in the dtype that was saved."""
        return self._join(name, lambda piece: self._masters[piece.rank][piece.flat])

    def state(self, name: str) -> dict[str, Any]:
        """Returns the optimizer's state for a parameter: tensors of its shape, and scalars such as its step count.

        Raises:
            CheckpointError: state that has neither the shape of the parameter nor is a scalar.
        """
        first = self._pieces[name][0]
        found: dict[str, Any] = {}
        for key, value in self._states[first.rank].get(first.flat, {}).items():
            if isinstance(value, Tensor) and value.dim() > 0:
                if value.numel() < self._masters[first.rank][first.flat].numel():
                    raise CheckpointError(
                        f"{self.folder}: the optimizer's {key!r} has shape {tuple(value.shape)}, which is not that of "
                        f"{name}: load it with the stage and the number of ranks that saved it"
                    )
                value = self._join(name, lambda piece, key=key: self._states[piece.rank][piece.flat][key])  # type: ignore[misc]
            found[key] = value
        return found

    def keys(self) -> set[str]:
        """Returns the names in the model's state dict."""
        return set(self._models[0]["module"])

    def rest(self) -> dict[str, Any]:
        """Returns the entries of the model's state dict that do not train, as they were saved."""
        tied, trained = self.record["tied"], set(self.trained)
        values = {
            name: value for name, value in self._models[0]["module"].items() if tied.get(name, name) not in trained
        }
        if self.record["stage"] == 3:  # where the module has empty tensors in place of parameters
            for name in self.record["frozen"]:
                parts = [content["frozen_param_fragments"][name] for content in self._models]
                values[name] = self._shaped(name, torch.cat([part.reshape(-1) for part in parts]))
        return values

    def module(self) -> dict[str, Any]:
        """Returns the model's state dict: master weights where a parameter trains, the rest as it was saved."""
        values = self.rest() | {name: self.master(name) for name in self.trained}
        values |= {other: values[name] for other, name in self.record["tied"].items()}
        return {name: values[name] for name in self._models[0]["module"]}

    def as_base(self, like: dict[str, Any], states: dict[int, dict[str, Any]]) -> dict[str, Any]:
        """Returns the state dict `like` of a torch optimizer with `states` and the saved groups in it."""
        groups = [
            {**saved, "params": mine["params"]} for saved, mine in zip(self.groups, like["param_groups"], strict=True)
        ]
        return {"state": states, "param_groups": groups}

    def counts(self) -> dict[str, int]:
        """Returns how many steps the engine has taken."""
        return {key: self._models[0][key] for key in ("global_steps", "global_samples", "skipped_steps")}

    def _join(self, name: str, flat_of: Callable[[Piece], Tensor]) -> Tensor:
        parts = [flat_of(piece).reshape(-1)[piece.start : piece.start + piece.numel] for piece in self._pieces[name]]
        return self._shaped(name, torch.cat(parts) if parts else torch.empty(0))

    def _shaped(self, name: str, flat: Tensor) -> Tensor:
        numel = self._numel(name)
        if not numel <= flat.numel() < numel + self.record["world_size"]:  # the last share may be padded
            raise CheckpointError(f"{self.folder} has {flat.numel()} elements of {name}, which has {numel}")
        return flat[:numel].view(self.record["shapes"][name])

    def _numel(self, name: str) -> int:
        return math.prod(self.record["shapes"][name])
