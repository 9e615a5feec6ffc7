"""From a file: models whose values a file brings (`fabric.init_module(empty_init=True)`) have them before they run."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from precision_core.policy import listed
from precision_fsdp.materialise import InitFn, does_reset, keys_on_meta, not_in_files, tensor_of, unset_value

_KEY = "_precision_fsdp_empty"


class Empty:
    """The modules that were built for a file to fill."""

    def __init__(self) -> None:
        self.modules: WeakSet[nn.Module] = WeakSet()

    def __reduce__(self) -> tuple[type[Empty], tuple[()]]:
        return Empty, ()  # in a process that is started with the strategy none is built yet

    @contextmanager
    def building(self) -> Iterator[None]:
        """Context in which modules that get parameters or buffers are noted."""
        add = (register_module_parameter_registration_hook, register_module_buffer_registration_hook)
        handles = [each(self._note) for each in add]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        self.modules.add(module)


def _left_empty(root: nn.Module, init_fn: InitFn | None, empty: Container[nn.Module]) -> dict[str, nn.Module]:
    """Returns the modules in `empty` that nothing has to initialise: not for a buffer that no file has, theirs or that
    of a module around them whose `reset_parameters()` may set them, too."""
    around = [
        name
        for name, module in root.named_modules()
        if not_in_files(module) and (init_fn is None and does_reset(module))
    ]
    return {
        name: module
        for name, module in root.named_modules()
        if module in empty
        and not not_in_files(module)
        and not any(name == other or not other or name.startswith(f"{other}.") for other in around)
    }


@torch.no_grad()
def leave_empty(
    root: nn.Module,
    init_fn: InitFn | None,
    device: torch.device,
    *,
    offload: bool,
    empty: Container[nn.Module],
) -> dict[str, Tensor]:
    """Gives the modules in `empty` of the sharded `root` shards and buffers of NaN, zeros where a dtype has none.

    Those tied stay tied. Returns them by name. Arguments as of `materialise`, which does the rest.
    """
    made: dict[Tensor, Tensor] = {}
    names: dict[str, Tensor] = {}
    for name, module in _left_empty(root, init_fn, empty).items():
        for key in keys_on_meta(module):
            like = tensor_of(module, key)
            is_param = key in module._parameters
            if like not in made:
                new = torch.empty_like(like, device="cpu" if offload and is_param else device)
                (new.to_local() if isinstance(new, DTensor) else new).fill_(unset_value(like))
                made[like] = nn.Parameter(new, requires_grad=like.requires_grad) if is_param else new
                names[f"{name}.{key}" if name else key] = made[like]
            slots: dict[str, Any] = module._parameters if is_param else module._buffers
            slots[key] = made[like]
    return names


def expect(root: nn.Module, names: dict[str, Tensor]) -> None:
    """Has the first forward of `root` want other values in these tensors: written to since, or replaced."""
    if not names:
        return
    vars(root)[_KEY] = {name: (tensor, tensor._version) for name, tensor in names.items()}

    def check(module: nn.Module, args: Any) -> None:
        check_filled(module)
        hook.remove()

    hook = root.register_forward_pre_hook(check, prepend=True)  # FSDP's own, which gathers, comes after it


def check_filled(root: nn.Module) -> None:
    """Raises `RuntimeError` naming what nothing has filled; where there is nothing it looks no more."""
    waiting: dict[str, tuple[Tensor, int]] | None = vars(root).get(_KEY)
    if waiting is None:
        return
    live = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    empty = [
        name
        for name, (tensor, version) in waiting.items()
        if name in live and live[name] is tensor and live[name]._version == version
    ]
    if empty:
        raise RuntimeError(
            f"{listed(empty, 5)} have no values: the model was built in fabric.init_module(empty_init=True), for a "
            "file to fill. Call fabric.load_module(path, model), or fabric.load(path, {...}), after fabric.setup and "
            "before the first forward; leave empty_init out where values are to be drawn"
        )
    del vars(root)[_KEY]
