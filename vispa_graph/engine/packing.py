"""Weights of linear layers packed for small batches on a processor.

A decoding step multiplies each weight matrix with as many vectors as there are rows. Torch's default product of a matrix with 2 to 64
vectors reads the weights about half as fast as that with one; over weights that oneDNN has packed once, it does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

# Vectors in one product up to which packed weights are faster: decoding steps, and not the reading of prompts.
_FEW = 64

_log = logging.getLogger(__name__)


class PackedWeights:
    """Packed copies of a model's float32 weights on a processor, used wherever a linear layer gets few vectors.

    The largest matrices come first (the language-model head gains most), as long as the copies fit into `most_bytes`. The model's own
    weights stay as they are, and must: what changes them later does not change the copies. Nothing is packed on other devices, in other
    precisions, without oneDNN, or where a copy cannot be made (memory that runs out is warned of).
    """

    def __init__(self, model: nn.Module, most_bytes: int) -> None:
        self.bytes = 0
        self._packed: list[nn.Linear] = []
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return
        try:
            self._pack([cast(nn.Linear, module) for module in model.modules() if _packable(module)], most_bytes)
        except BaseException as error:
            self.remove()
            if not isinstance(error, RuntimeError | MemoryError | AttributeError):  # of memory, of oneDNN, or of a torch without its operators
                raise
            _log.warning("The weights are not packed (%s: %s), so small batches are slower.", type(error).__name__, str(error).partition("\n")[0])

    def _pack(self, linears: list[nn.Linear], most_bytes: int) -> None:
        for linear in sorted(linears, key=_size, reverse=True):
            if self.bytes + _size(linear) <= most_bytes:
                vars(linear)["forward"] = _forward(linear)
                self._packed.append(linear)
                self.bytes += _size(linear)

    def remove(self) -> None:
        """Give every layer its own product back and free the copies. Idempotent."""
        for linear in self._packed:
            vars(linear).pop("forward", None)
        self._packed, self.bytes = [], 0


def _packable(module: nn.Module) -> bool:
    """Whether it is a plain linear layer in float32 on a processor, whose forward nobody has replaced."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    # Quantised, sharded and sparse weights come as other tensors in the same kind of layer.
    plain = type(weight) is nn.Parameter and weight.layout == torch.strided
    return plain and weight.dtype == torch.float32 and weight.device.type == "cpu"


def _size(linear: nn.Linear) -> int:
    return linear.weight.nbytes


def _forward(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    # The operators that torch's own compiler uses for frozen weights.
    packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _FEW)
    dense, bias = linear.forward, linear.bias

    def forward(input: torch.Tensor) -> torch.Tensor:
        if input.numel() > _FEW * input.shape[-1]:
            return dense(input)
        return cast(torch.Tensor, torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], ""))

    return forward
