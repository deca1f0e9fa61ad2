"""Weights of linear layers packed for small batches on a processor.

A decoding step multiplies each weight matrix with as many vectors as there are rows. Torch's default product of a matrix with 2 to 64
vectors reads the weights about half as fast as that with one; over weights that oneDNN has packed once, it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

# Vectors in one product up to which packed weights are faster: decoding steps, and not the reading of prompts.
_FEW = 64


class PackedWeights:
    """Packed copies of a model's float32 weights on a processor, used wherever a linear layer gets few vectors.

    The largest matrices come first (the language-model head gains most), as long as the copies fit into `most_bytes`. The model's own
    weights stay as they are. Nothing is packed on other devices, in other precisions, or without oneDNN.
    """

    def __init__(self, model: nn.Module, most_bytes: int) -> None:
        self.bytes = 0
        self._packed: list[nn.Linear] = []
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return
        for linear in sorted(filter(_packable, model.modules()), key=_size, reverse=True):
            if self.bytes + _size(linear) <= most_bytes:
                self.bytes += _size(linear)
                self._packed.append(cast(nn.Linear, linear))
                linear.forward = _forward(self._packed[-1])

    def remove(self) -> None:
        """Give every layer its own product back and free the copies. Idempotent."""
        for linear in self._packed:
            del linear.forward
        self._packed, self.bytes = [], 0


def _packable(module: nn.Module) -> bool:
    """Whether it is a plain linear layer in float32 on a processor, whose forward nobody has replaced."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return module.weight.dtype == torch.float32 and module.weight.device.type == "cpu"


def _size(linear: nn.Module) -> int:
    return cast(nn.Linear, linear).weight.nbytes


def _forward(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    # The operators that torch's own compiler uses for frozen weights.
    packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _FEW)
    dense, bias = linear.forward, linear.bias

    def forward(input: torch.Tensor) -> torch.Tensor:
        if input.numel() > _FEW * input.shape[-1]:
            return dense(input)
        return cast(torch.Tensor, torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], ""))

    return forward
