"""Whether all ranks' backwards give gradients to the same parameters, one after the other in the same order.

From stage 2 on DeepSpeed reduces gradients in the order in which a rank computes them, in one flat tensor; at stage 3
it gathers parameters in the order in which a rank needs them. Ranks that use other parts of the model would add up
gradients, and gather values, of different parameters, and nothing would say so (0.19.8). Where stage 3 has traced an
earlier step, ranks may also wait for each other in its gathers, before this can look: the group's timeout ends that.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


class Order:
    """Notes in which order the parameters of `module` get gradients; ranks compare that before a step."""

    def __init__(self, module: nn.Module, device: torch.device | str) -> None:
        self._device = device
        self._noted = 0
        params = [param for param in module.parameters() if param.requires_grad]
        self._hooks = [
            param.register_post_accumulate_grad_hook(functools.partial(self._note, number))
            for number, param in enumerate(params, start=1)
        ]

    def _note(self, number: int, param: Tensor) -> None:
        self._noted = (self._noted * 1_000_003 + number) % (2**61 - 1)

    def forget(self) -> None:
        """Begins anew, as after a step."""
        self._noted = 0

    def check(self) -> None:
        """Raises `RuntimeError` on all ranks where one of them had another order since the last step."""
        both = torch.tensor([self._noted, -self._noted], dtype=torch.int64, device=self._device)
        self.forget()
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        largest, smallest = both.tolist()
        if largest != -smallest:
            raise RuntimeError(
                "ranks gave gradients to different parameters, or in another order, since the last step: from stage 2 "
                "on DeepSpeed would mix those of one with another's. Let every rank use all of the model (add 0 * "
                "part(x).sum() to the loss), or pass stage=0 or 1"
            )

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()
