"""Permanent forward hooks on the decoder blocks, idle unless the running batch says what to do.

The calibration of the paper happens in the prefill: hooks run in the order of the blocks, so block l's hook reads the state
that the blocks before it have already changed, solves the magnitude there, and adds. The magnitudes are then held while
generating.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vispa_graph.engine.contract import Steering, SteeringReport
from vispa_graph.engine.layers import block_output
from vispa_graph.errors import NonFiniteError


class BatchPlan:
    """What is added to each row of one batch at each block.

    A row may be steered by several values. Each of them is an entry, E in all; `weights[l]` is [E, d], zero for entries that do not
    steer at block l. A calibrated entry has eps solved as `max(0, logit(P0) - b - w.e) / (w.w)` times its strength (ConVA; VISPA),
    where e is its row's last prompt token's state; below strength 0 as `min(0, -logit(P0) - b - w.e) / (w.w)`. An entry of fixed
    magnitude has alpha times its strength. A row gets the sum over its entries.
    """

    def __init__(self, steerings: Sequence[Steering | None], device: torch.device) -> None:
        self._entries = [(row, part, s.positions) for row, s in enumerate(steerings) if s for part in s.parts]
        self._rows = len(steerings)
        self.layers = tuple(sorted({layer for _, part, _ in self._entries for layer in part.direction.layers}))
        self._weights: dict[int, torch.Tensor] = {}
        self._bias: dict[int, torch.Tensor] = {}
        self._delta: dict[int, torch.Tensor] = {}
        self._solved: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for layer in self.layers:
            at = [(number, part.direction) for number, (_, part, _) in enumerate(self._entries) if layer in part.direction.layers]
            weights = torch.zeros(len(self._entries), at[0][1].vectors.shape[1])
            bias = torch.zeros(len(self._entries))
            for number, direction in at:
                index = direction.layers.index(layer)
                weights[number] = torch.from_numpy(direction.vectors[index])
                bias[number] = float(direction.bias[index])
            self._weights[layer], self._bias[layer] = weights.to(device), bias.to(device)
        parts = [part for _, part, _ in self._entries]
        self._row = torch.tensor([row for row, _, _ in self._entries], dtype=torch.long, device=device)
        self._calibrated = torch.tensor([part.direction.method == "probe" for part in parts], device=device)
        self._sign = torch.tensor([math.copysign(1.0, part.strength) for part in parts], device=device)
        self._target = torch.tensor([_logit(part.target_probability) for part in parts], device=device) * self._sign
        self._fixed = torch.tensor([part.direction.alpha * math.copysign(1.0, part.strength) for part in parts], device=device)
        self._strength = torch.tensor([abs(part.strength) for part in parts], device=device)

    def apply(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output [rows, positions, d] with every row's delta added at all positions."""
        if layer not in self._delta:
            self._solve(layer, hidden)
        return hidden + self._delta[layer][:, None, :]

    def _solve(self, layer: int, hidden: torch.Tensor) -> None:
        """Solve the magnitudes from the last prompt token, in float32 whatever the model's dtype. Prompts are padded left."""
        device = hidden.device  # a model spread over devices has its blocks on several
        row, weights, sign = self._row.to(device), self._weights[layer].to(device), self._sign.to(device)
        last = hidden[:, -1, :].float()
        square = (weights * weights).sum(-1)
        score = (weights * last[row]).sum(-1) + self._bias[layer].to(device)
        eps = sign * (sign * (self._target.to(device) - score)).clamp(min=0) / square.clamp(min=torch.finfo(torch.float32).tiny)
        magnitude = torch.where(self._calibrated.to(device), eps, self._fixed.to(device)) * self._strength.to(device)
        magnitude = torch.where(square > 0, magnitude, torch.zeros_like(magnitude))
        added = torch.zeros_like(last).index_add_(0, row, magnitude[:, None] * weights)
        if not torch.isfinite(torch.cat([added, last])).all():
            raise NonFiniteError(
                f"The activations at layer {layer} are not finite, so no magnitude can be solved. "
                "Try dtype float32 or bfloat16, or a smaller strength."
            )
        # What was added by all of a row's values together moves each value's probe.
        moved = (weights * added[row]).sum(-1)
        self._solved[layer] = (magnitude, score, score + moved, last.norm(dim=-1))
        self._delta[layer] = added.to(hidden.dtype)

    def report(self, row: int) -> SteeringReport | None:
        """What was done to a row, once the prefill is over; None for an unsteered row."""
        numbers = [number for number, (its_row, _, _) in enumerate(self._entries) if its_row == row]
        if not numbers:
            return None
        layers = sorted({layer for number in numbers for layer in self._entries[number][1].direction.layers})
        solved = {layer: [t.cpu() for t in self._solved[layer]] for layer in layers}
        moved = sum(((solved[layer][0][numbers, None] * self._weights[layer][numbers].cpu()).sum(0) for layer in layers), torch.zeros(1))
        # Measured at the row's own last block: which others the batch steers must not show.
        displacement = float(moved.norm() / solved[layers[-1]][3][row].clamp(min=1e-9))
        first, *others = (self._entry(number, solved, displacement) for number in numbers)
        return replace(first, others=tuple(others))

    def _entry(self, number: int, solved: dict[int, list[torch.Tensor]], displacement: float) -> SteeringReport:
        _, part, positions = self._entries[number]
        layers = part.direction.layers
        magnitude, before, after = (tuple(float(solved[layer][kind][number]) for layer in layers) for kind in range(3))
        probe = part.direction.method == "probe"
        return SteeringReport(
            layers=layers,
            magnitude=magnitude,
            before=tuple(map(_sigmoid, before)) if probe else None,
            after=tuple(map(_sigmoid, after)) if probe else None,
            displacement=displacement,
            value=part.direction.value,
            positions=positions,
        )


class Hooks:
    """The hooks on one model's blocks. Only one thread may run the model."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._plan: BatchPlan | None = None
        self._record: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]] | None = None
        self._handles = [block.register_forward_hook(self._hook(layer)) for layer, block in enumerate(blocks)]

    def _hook(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> Any:
            if self._record is not None:
                rows, places, states = self._record
                hidden = block_output(output)
                states.append(hidden[rows.to(hidden.device), places.to(hidden.device)].float().cpu())
            if self._plan is None or layer not in self._plan.layers:
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
    def recording(self, rows: torch.Tensor, places: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Collect, block by block, the states [texts, d] at `places[text]` of the rows `rows[text]`."""
        states: list[torch.Tensor] = []
        self._record = (rows, places, states)
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
