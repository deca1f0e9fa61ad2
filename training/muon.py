"""Muon (Jordan et al. 2024): momentum whose update is made orthogonal by a Newton-Schulz iteration.

`torch.optim.Muon` iterates in bfloat16 always, which is many times slower on a CPU without bfloat16 arithmetic; this one takes
the matrices of one shape together and iterates in bfloat16 only where the processor has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

# Coefficients of the quintic iteration, from the Muon paper: they drive all singular values into about 0.7..1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315


_PRECISION = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def orthogonalised(gradients: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly; [count, rows, columns] in and out."""
    x = (gradients / (gradients.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(_PRECISION)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.mT if tall else x).to(gradients.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonal updates, scaled so that AdamW's learning rates fit.

    Args:
        params: Matrices only; those of one shape are updated in one batch.
        lr: Learning rate.
        momentum: Share of the old momentum that stays at each step.
        weight_decay: Decoupled, a multiple of the learning rate.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix once."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                nesterov = []
                for parameter in parameters:
                    velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
                    velocity.lerp_(parameter.grad, 1 - group["momentum"])
                    nesterov.append(parameter.grad.lerp(velocity, group["momentum"]))
                scale = 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, orthogonalised(torch.stack(nesterov)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)
