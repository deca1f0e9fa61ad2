"""Permanent forward hooks on the decoder blocks, idle unless the running batch says what to do.

The calibration of the paper happens in the prefill: hooks run in the order of the blocks, so block l's hook reads the state
that the blocks before it have already changed, solves the magnitude there, and adds. The magnitudes are then held while
generating.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vispa_graph.engine.contract import Steering, SteeringReport
from vispa_graph.engine.layers import block_output
from vispa_graph.errors import NonFiniteError


class BatchPlan:
    """What is added to each row of one batch at each block.

    `weights[l]` is [rows, d], zero for rows that are not steered at block l. A calibrated row has eps solved as
    `max(0, logit(P0) - b - w.e) / (w.w)` times its strength (ConVA; VISPA), where e is its last prompt token's state; a
    row of fixed magnitude has alpha times its strength.
    """

    def __init__(self, steerings: Sequence[Steering | None], device: torch.device) -> None:
        self.steerings = tuple(steerings)
        rows = len(self.steerings)
        self.layers = tuple(sorted({layer for s in self.steerings if s for layer in s.direction.layers}))
        self.weights: dict[int, torch.Tensor] = {}
        self.bias: dict[int, torch.Tensor] = {}
        self.delta: dict[int, torch.Tensor] = {}
        self.magnitude: dict[int, torch.Tensor] = {}
        self.before: dict[int, torch.Tensor] = {}
        self.norm: dict[int, torch.Tensor] = {}
        for layer in self.layers:
            first = next(s.direction for s in self.steerings if s and layer in s.direction.layers)
            weights = torch.zeros(rows, first.vectors.shape[1])
            bias = torch.zeros(rows)
            for row, steering in enumerate(self.steerings):
                if steering and layer in steering.direction.layers:
                    index = steering.direction.layers.index(layer)
                    weights[row] = torch.from_numpy(steering.direction.vectors[index])
                    bias[row] = float(steering.direction.bias[index])
            self.weights[layer], self.bias[layer] = weights.to(device), bias.to(device)
        self.calibrated = torch.tensor([bool(s and s.direction.method == "probe") for s in self.steerings], device=device)
        self.target = torch.tensor([_logit(s.target_probability) if s else 0.0 for s in self.steerings], device=device)
        self.fixed = torch.tensor([s.direction.alpha if s else 0.0 for s in self.steerings], device=device)
        self.strength = torch.tensor([s.strength if s else 0.0 for s in self.steerings], device=device)

    def apply(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output [rows, positions, d] with every row's delta added at all positions."""
        if layer not in self.delta:
            self._solve(layer, hidden)
        return hidden + self.delta[layer][:, None, :]

    def _solve(self, layer: int, hidden: torch.Tensor) -> None:
        """Solve the magnitudes from the last prompt token, in float32 whatever the model's dtype. Prompts are padded left."""
        weights = self.weights[layer].to(hidden.device)
        last = hidden[:, -1, :].float()
        bias, target = self.bias[layer].to(last.device), self.target.to(last.device)
        square = (weights * weights).sum(-1)
        score = (weights * last).sum(-1) + bias
        eps = (target - score).clamp(min=0) / square.clamp(min=torch.finfo(torch.float32).tiny)
        magnitude = torch.where(self.calibrated.to(last.device), eps, self.fixed.to(last.device)) * self.strength.to(last.device)
        magnitude = torch.where(square > 0, magnitude, torch.zeros_like(magnitude))
        if not torch.isfinite(magnitude).all() or not torch.isfinite(last).all():
            raise NonFiniteError(
                f"The activations at layer {layer} are not finite, so no magnitude can be solved. Try dtype float32 or bfloat16, or a smaller strength."
            )
        self.before[layer], self.magnitude[layer] = score.cpu(), magnitude.cpu()
        self.norm[layer] = last.norm(dim=-1).cpu()
        self.delta[layer] = (magnitude[:, None] * weights).to(hidden.dtype)

    def report(self, row: int) -> SteeringReport | None:
        """What was done to a row, once the prefill is over; None for an unsteered row."""
        steering = self.steerings[row]
        if steering is None:
            return None
        direction = steering.direction
        magnitude = tuple(float(self.magnitude[layer][row]) for layer in direction.layers)
        moved = sum((m * self.weights[layer][row].cpu() for m, layer in zip(magnitude, direction.layers, strict=True)), torch.zeros(1))
        before = after = None
        if direction.method == "probe":
            scores = [float(self.before[layer][row]) for layer in direction.layers]
            squares = [float((self.weights[layer][row] ** 2).sum()) for layer in direction.layers]
            before = tuple(_sigmoid(score) for score in scores)
            after = tuple(_sigmoid(s + m * w) for s, m, w in zip(scores, magnitude, squares, strict=True))
        # Measured at the row's own last block: which others the batch steers must not show.
        norm = self.norm[direction.layers[-1]][row].clamp(min=1e-9)
        return SteeringReport(direction.layers, magnitude, before, after, float(moved.norm() / norm))


class Hooks:
    """The hooks on one model's blocks. Only one thread may run the model."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._plan: BatchPlan | None = None
        self._record: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self._handles = [block.register_forward_hook(self._hook(layer)) for layer, block in enumerate(blocks)]

    def _hook(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> Any:
            if self._record is not None:
                last, states = self._record
                hidden = block_output(output)
                states.append(hidden[torch.arange(len(last)), last.to(hidden.device)].float().cpu())
            if self._plan is None or layer not in self._plan.weights:
                return None  # the output stays the very same object
            steered = self._plan.apply(layer, block_output(output))
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return hook

    @contextmanager
    def steering(self, plan: BatchPlan) -> Iterator[None]:
        """Steer every forward pass inside the context; nothing is left behind."""
        self._plan = plan if plan.layers else None
        try:
            yield
        finally:
            self._plan = None

    @contextmanager
    def recording(self, last: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Collect, block by block, the state [rows, d] at position `last[row]` of each row."""
        states: list[torch.Tensor] = []
        self._record = (last, states)
        try:
            yield states
        finally:
            self._record = None

    def remove(self) -> None:
        """Take the hooks off the model. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))
