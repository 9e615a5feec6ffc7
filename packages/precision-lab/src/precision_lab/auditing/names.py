"""Names of modules and parameters as the user knows them, whatever wrappers an engine puts around."""

from __future__ import annotations

from torch import Tensor, nn

_WRAPPERS = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes by which DDP, torch.compile, Lightning's Fabric, FSDP and checkpoint wrappers hold what they wrap."""


def clean(path: str) -> str:
    """Returns the path without the wrappers' own parts."""
    return ".".join(part for part in path.split(".") if part and part not in _WRAPPERS)


class Names:
    """The models that were seen, and the names of what is in them."""

    def __init__(self) -> None:
        self.roots: list[nn.Module] = []
        self._paths: dict[int, str] = {}
        self._params: dict[int, str] = {}

    def add(self, root: nn.Module) -> None:
        """Takes a model whose forward was called, or that the user gave; one inside a model that is known is left."""
        if id(root) in self._paths:
            return
        inside = {id(module) for module in root.modules()}
        self.roots = [each for each in self.roots if id(each) not in inside]
        self.roots.append(root)
        self.refresh()

    def refresh(self) -> None:
        """Reads all names anew: an engine may have replaced parameters, a user may have added modules."""
        self._paths, self._params = {}, {}
        several = len([root for root in self.roots if any(True for _ in root.parameters())]) > 1
        for root in self.roots:
            prefix = type(root).__name__ if several else ""
            for path, module in root.named_modules(remove_duplicate=True):
                self._paths.setdefault(id(module), clean(f"{prefix}.{path}"))
            for path, param in root.named_parameters():
                self._params.setdefault(id(param), clean(f"{prefix}.{path}"))

    def path(self, module: nn.Module) -> str:
        """Returns the module's path; that of one that no model contains is its class's name."""
        found = self._paths.get(id(module))
        return type(module).__name__ if found is None else found

    def root(self, module: nn.Module) -> nn.Module:
        """Returns the model that contains the module."""
        return next((root for root in self.roots if any(each is module for each in root.modules())), module)

    def knows(self, module: nn.Module) -> bool:
        """Whether a model that was seen contains it."""
        return id(module) in self._paths

    def param(self, param: Tensor) -> str | None:
        """Returns the parameter's name, or None where no model has it."""
        found = self._params.get(id(param))
        if found is None and self.roots:
            self.refresh()
            found = self._params.get(id(param))
        return found
