"""The official procedure, plain and sequential, to measure the engine against.

For each value, one whole forward pass over the prompt for each steered layer in ascending order, each with what the layers before it
add; then one generation by itself. VISPA's public code works like this; docs/method.md has the formula. A plain forward pass computes
the logits of every position, and so do these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vispa_graph.engine.contract import Steering


def calibrate(model: Any, blocks: nn.ModuleList, ids: torch.Tensor, steering: Steering) -> dict[int, torch.Tensor]:
    """What each steered layer adds: eps * w, [width] each. `ids` is [1, positions]."""
    direction = steering.direction
    deltas: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(direction.layers):
        seen: list[torch.Tensor] = []
        handle = blocks[layer].register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(_hidden(output)[0, -1].float()))
        try:
            with torch.inference_mode(), adding(blocks, deltas):
                model(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        w = torch.from_numpy(direction.vectors[index]).to(seen[0])
        wanted = math.log(steering.target_probability / (1 - steering.target_probability))
        eps = ((wanted - float(direction.bias[index]) - w @ seen[0]) / (w @ w)).clamp(min=0)
        deltas[layer] = (steering.strength * eps * w).to(model.dtype)
    return deltas


def generate(model: Any, blocks: nn.ModuleList, ids: torch.Tensor, deltas: dict[int, torch.Tensor], new_tokens: int) -> list[int]:
    """The new tokens of one greedy generation with the deltas added at every position."""
    with torch.inference_mode(), adding(blocks, deltas):
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
    return out[0, ids.shape[1] :].tolist()


@contextmanager
def adding(blocks: nn.ModuleList, deltas: dict[int, torch.Tensor]) -> Iterator[None]:
    """Add a vector to every position of some blocks' outputs."""

    def hook(delta: torch.Tensor) -> Any:
        def add(_module: nn.Module, _inputs: object, output: Any) -> Any:
            hidden = _hidden(output) + delta
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return add

    handles = [blocks[layer].register_forward_hook(hook(delta)) for layer, delta in deltas.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
