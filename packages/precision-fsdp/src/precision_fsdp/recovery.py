"""Recovery: after an exception in backward FSDP's own state is that of a step half done.

Its root would then silently stop reducing gradients. From torch 2.13 on FSDP2 can be reset; with an older one the next
forward raises.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule

from precision_fsdp.unsynced import drop

_KEY = "_precision_fsdp_lost"


def begin_anew(module: nn.Module) -> None:
    """Has FSDP forget the step that failed, with its gradients; where it cannot, the next forward raises."""
    assert isinstance(module, FSDPModule)
    try:
        module.reset_iter_state()
    except (AttributeError, RuntimeError):
        vars(module)[_KEY] = True
    else:
        drop(module)  # what backward had accumulated before it failed


def check_not_lost(module: nn.Module) -> None:
    """Raises `RuntimeError` for a module that an exception in backward has left with parameters that cannot train."""
    if _KEY in vars(module):
        raise RuntimeError(
            "backward raised an exception before, and this torch's FSDP cannot go on after one: some parameters would "
            "silently stop training. Start again from a checkpoint; torch 2.13 can"
        )
