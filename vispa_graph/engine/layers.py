"""Finding the decoder blocks of any Hugging Face causal language model, and choosing which to steer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vispa_graph.errors import LayerError, UnsteerableModelError

# The paper steers blocks 10 to 25 of a model of 32; for another depth the same fractions are kept.
_FIRST, _LAST, _OF = 10, 25, 32


def default_layers(depth: int) -> tuple[int, ...]:
    """The paper's blocks for a model of `depth` blocks: zero-based, ascending, at least one."""
    return check_layers((_FIRST / _OF, _LAST / _OF), depth)


def check_layers(layers: Sequence[float], depth: int) -> tuple[int, ...]:
    """The layers as block numbers, ascending and without duplicates.

    Args:
        layers: Zero-based block numbers; or, as floats from 0 to 1, the first and last block (inclusive) as fractions of the depth.
        depth: Number of blocks.

    Raises:
        LayerError: There are none, the model does not have one of them, or fractions are not one or two from 0 to 1, ascending.
    """
    if any(isinstance(layer, float) for layer in layers):
        if len(layers) > 2 or not all(isinstance(layer, float) and 0 <= layer <= 1 for layer in layers) or layers[0] > layers[-1]:
            raise LayerError("Fractions of the depth are two, the first and last block, ascending from 0 to 1. Give such as 0.3 and 0.8.")
        first, last = (min(round(layer * depth), depth - 1) for layer in (layers[0], layers[-1]))
        return tuple(range(first, last + 1))
    numbers = {int(layer) for layer in layers}
    if not numbers:
        raise LayerError("No layer was chosen. Choose at least one, or leave the layers out for the default.")
    for layer in sorted(numbers):
        if not 0 <= layer < depth:
            raise LayerError(f"Layer {layer} does not exist: this model has {depth} (0 to {depth - 1}). Choose layers within that range.")
    return tuple(sorted(numbers))


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: the shallowest module list as long as the configuration says the model is deep.

    Raises:
        UnsteerableModelError: There is none, or several that cannot be told apart.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise UnsteerableModelError(
            "The model has no configuration, so its decoder blocks cannot be counted. Give a Hugging Face causal language model."
        )
    text_config = config.get_text_config(decoder=True)
    depth = getattr(text_config, "num_hidden_layers", None)
    root = _decoder(model)
    found = _shallowest(root, depth)
    if not found:
        raise UnsteerableModelError(
            f"{type(model).__name__} has no list of {depth} decoder blocks, so it cannot be steered. "
            "Choose a decoder-only model whose blocks stand in one ModuleList."
        )
    named = set(getattr(model, "_no_split_modules", None) or ())
    return max(found, key=lambda blocks: (type(blocks[0]).__name__ in named, sum(p.numel() for p in blocks.parameters())))


def _decoder(model: nn.Module) -> nn.Module:
    get_decoder = getattr(model, "get_decoder", None)
    if callable(get_decoder):
        decoder = get_decoder()
        if isinstance(decoder, nn.Module):
            return decoder
    base = getattr(model, "base_model", None)
    return base if isinstance(base, nn.Module) else model


def _shallowest(root: nn.Module, length: int | None) -> list[nn.ModuleList]:
    """The module lists of this length at the least depth below the root at which there are any."""
    level: list[nn.Module] = [root]
    while level:
        found = [module for module in level if isinstance(module, nn.ModuleList) and len(module) == length]
        if found:
            return found
        level = [child for module in level for child in module.children()]
    return []


def block_output(output: object) -> torch.Tensor:
    """The hidden state [rows, positions, width] in what a block returns: a tensor, or a tuple that begins with one.

    Raises:
        UnsteerableModelError: It is neither.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, torch.Tensor):
        raise UnsteerableModelError(f"A decoder block returned {type(output).__name__}, not a hidden state. This architecture cannot be steered.")
    return hidden
