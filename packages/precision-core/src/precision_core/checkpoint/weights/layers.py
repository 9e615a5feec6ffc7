"""The layers of a module as they are loaded from a file: the tensors of each, their names in the file, mismatches.

A plain layer's tensors are copied one by one. A layer that loads its own way (`_load_from_state_dict`, hooks, extra
state: layers that quantise) gets its tensors through `load_state_dict`.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.live.compare import mismatch
from precision_core.checkpoint.live.left_out import less_tied
from precision_core.checkpoint.live.own_way import loads_its_own_way, overrides
from precision_core.checkpoint.live.state import named_tensors, plain_name
from precision_core.checkpoint.shards import cut, is_sharded
from precision_core.checkpoint.weights.safetensors import Files
from precision_core.precision.masters import Masters

VERSIONS = "precision.versions"
"""Key in a file's metadata: JSON of module prefix -> version."""


class Loaded(NamedTuple):
    """Names that only the model has (`missing`) and that only the file has (`unexpected`); none when `strict`."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@dataclass
class Layer:
    """A unit of loading: a module's own tensors, or everything in a module that loads its own way."""

    prefix: str
    module: nn.Module
    own_way: bool
    slots: dict[str, Tensor] = field(default_factory=dict)
    """Full plain name -> live tensor."""


def layers_of(module: nn.Module, prefix: str = "") -> Iterator[Layer]:
    """Yields the layers of `module` in definition order; `prefix` starts the names of its tensors."""
    is_lazy_layer = hasattr(module, "_load_hook")
    if loads_its_own_way(module) or is_lazy_layer or (not prefix and overrides(module, "load_state_dict")):
        yield Layer(prefix, module, True)
        return
    buffers = {key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set}
    slots = {f"{prefix}{key}": value for key, value in {**module._parameters, **buffers}.items() if value is not None}
    yield Layer(prefix, module, False, slots)
    for key, child in module._modules.items():
        if child is not None:
            yield from layers_of(child, prefix + prefix_of(key))


def versions_of(files: Files, path: object) -> dict[str, int]:
    """Returns module prefix -> version as `save_module` wrote them; empty for other files."""
    try:
        versions = json.loads(files.metadata.get(VERSIONS, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {VERSIONS!r} in its metadata is not JSON") from error
    return versions if isinstance(versions, dict) else {}


def sources_of(files: Files, layers: list[Layer], aliases: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Returns model name -> name in the file, and a problem for each tied tensor that has two values in the file."""
    tied: dict[int, list[str]] = {}
    for layer in layers:
        for name, live in layer.slots.items():
            tied.setdefault(id(live), []).append(name)
    sources: dict[str, str] = {}
    contradictions: list[str] = []
    for names in tied.values():
        present = [name for name in names if name in files.names] or [
            aliases[name] for name in names if name in aliases
        ]
        sources.update((name, name if name in present else present[0]) for name in names if present)
        contradictions += [
            f"{name}: tied to {present[0]} in the model, with another value in the checkpoint"
            for name in present[1:]
            if not _equal(files.get(present[0]), files.get(name))
        ]
    return sources, contradictions


def _equal(a: Tensor, b: Tensor) -> bool:
    same = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))  # NaN equals NaN


def mismatches(
    files: Files, layers: list[Layer], sources: dict[str, str], strict: bool, masters: Masters
) -> Iterator[str]:
    """Yields mismatches of shape and dtype, and tensors that would stay without values."""
    for layer in layers:
        for name, live in layer.slots.items():
            if is_lazy(live):
                yield f"{name}: lazy, it has no shape yet; run a forward first"
            elif name in sources:
                values = files.get(sources[name])
                is_exact = masters.holds(live) and values.dtype in masters.exact
                if reason := mismatch(values, live, strict=strict and not is_exact):
                    yield f"{name}: {reason}"
            elif live.is_meta and not strict:
                yield f"{name}: on the meta device, and missing in the checkpoint"
        if not layer.own_way:
            for key in layer.module._non_persistent_buffers_set:
                buffer = layer.module._buffers[key]
                if buffer is not None and buffer.is_meta:
                    yield f"{layer.prefix}{key}: on the meta device, and no checkpoint has it: set its values first"


def load_plain(files: Files, layer: Layer, sources: dict[str, str], made: dict[int, Tensor], masters: Masters) -> None:
    """Copies a layer's tensors from the file; those on the meta device are replaced, once for tied ones (`made`)."""
    for name, live in layer.slots.items():
        if name not in sources:
            continue
        with torch.no_grad():
            values = _sharded_like(live, files.get(sources[name]))
            if not live.is_meta:
                if masters.holds(live) and values.dtype in masters.exact:
                    values, beside = masters.split(values)
                    live.copy_(values)
                    masters.keep(live, beside)
                else:
                    live.copy_(values)
                continue
            if id(live) not in made:
                new = values.to(live.dtype, copy=True)
                made[id(live)] = nn.Parameter(new, live.requires_grad) if isinstance(live, nn.Parameter) else new
                vars(made[id(live)]).update(vars(live))
            setattr(layer.module, name.removeprefix(layer.prefix), made[id(live)])


def _sharded_like(live: Tensor | None, values: Tensor) -> Tensor:
    """Returns `values`, or this rank's shard of them if `live` is a DTensor."""
    if live is None or not is_sharded(live) or live.shape != values.shape:
        return values
    return cut(values, live).to(live.device)


def load_own_way(files: Files, layer: Layer, sources: dict[str, str], versions: dict[str, int], strict: bool) -> Loaded:
    """Loads all tensors under the module's prefix with its `load_state_dict`.

    A user's override gets `strict`, and may return nothing; torch's returns missing and unexpected names.
    """
    module, prefix = layer.module, layer.prefix
    tensors = named_tensors(module)
    on_meta = any(tensor.is_meta for tensor in tensors.values())
    live_names = {plain_name(name): name for name in tensors}
    unsharded = _loaded_unsharded(module)
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, source in sources.items():
        if name.startswith(prefix):
            short = name.removeprefix(prefix)
            live_name = live_names.get(short, short)
            live = None if live_name in unsharded else tensors.get(live_name)
            state[live_name] = _sharded_like(live, files.get(source))
    prefixes = {name: prefix + prefix_of(name) for name, _ in module.named_modules()}
    state._metadata = {  # type: ignore[attr-defined]
        name: {"version": versions[full]} for name, full in prefixes.items() if full in versions
    }
    is_users = overrides(module, "load_state_dict")
    options: dict[str, Any] = {
        "strict": strict and is_users,
        **({"assign": on_meta} if on_meta or not is_users else {}),
    }
    try:
        missing, unexpected = module.load_state_dict(state, **options) or ((), ())
    except Exception as error:
        what = (
            f"{prefix[:-1]} could not be loaded, other layers are changed"
            if prefix
            else "the module could not be loaded"
        )
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error
    if on_meta:
        _detach_from_file(module, state.values())
    empty = [prefix + plain_name(name) for name, tensor in named_tensors(module).items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"on the meta device, and missing in the checkpoint (other layers are changed): {', '.join(empty[:10])}"
        )
    lists = less_tied(missing, tensors), unexpected
    return Loaded(*(tuple(prefix + plain_name(name) for name in names) for names in lists))


def _loaded_unsharded(module: nn.Module) -> set[str]:
    """Returns the tensors that layers list in `loads_unsharded`: these layers get full tensors, and shard them."""
    layers = module.named_modules()
    return {f"{name}.{key}" if name else key for name, layer in layers for key in getattr(layer, "loads_unsharded", ())}


def _detach_from_file(module: nn.Module, values: Iterable[Tensor]) -> None:
    """Copies those of the module's tensors that are still mapped from the file."""
    mapped = {value.untyped_storage().data_ptr() for value in values}
    for tensor in named_tensors(module).values():
        if not tensor.is_meta and tensor.untyped_storage().data_ptr() in mapped:
            tensor.data = tensor.detach().clone()  # of packed weights, `data` may be a part


def prefix_of(module_name: str) -> str:
    """Returns the prefix of a module's tensor names: "layer.0.", or "" for the root."""
    return plain_name(f"{module_name}.") if module_name else ""
