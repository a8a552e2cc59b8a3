"""The activation between the linear layers of the frozen encoders, without a second copy of their widest tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["InplaceGELU"]


class InplaceGELU(nn.Module):
    """The exact GELU; it overwrites its input where autograd will not ask for that again.

    The widest activation of a block is then held once and not twice, and its memory, too large for the allocator to
    keep, is not fetched from the system twice: in a ViT-g on a CPU that was 4 % of the time in float32 and 10 % in
    bfloat16. Use it only on what nobody else holds, such as the output of the layer before.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Any shape and floating dtype, the same for the result."""
        if states.requires_grad:
            return F.gelu(states)
        overwritten: Tensor = torch.ops.aten.gelu_(states)  # torch.nn.functional has no form in place
        return overwritten
