"""Keys and values of a running batch, in buffers that have room for the next tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

# Positions by which a buffer grows.
_ROOM = 128


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A block's keys and values, [rows, heads, positions, width of a head], as views into larger buffers.

    `DynamicLayer` copies all of them into new memory at every token, which on a processor can take as long as the block itself.
    """

    most: int | None = None  # positions that will ever be held, where that is known: no buffer is larger
    _buffers: tuple[torch.Tensor, torch.Tensor]
    _shown: tuple[torch.Tensor, torch.Tensor] | None = None  # as last returned: others than these have been changed by somebody else

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states; returns all so far."""
        length = self.get_seq_length()
        if length == 0 or self.keys is None or self.values is None:
            return super().update(key_states, value_states, *args, **kwargs)
        end = length + key_states.shape[-2]
        ours = self._shown is not None and self.keys is self._shown[0] and self.values is self._shown[1]
        if not ours or end > self._buffers[0].shape[-2]:
            room = end + _ROOM if self.most is None else max(end, min(end + _ROOM, self.most))
            self._buffers = _roomier(self.keys, room), _roomier(self.values, room)
        keys, values = self._buffers
        keys[..., length:end, :] = key_states
        values[..., length:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        self._shown = self.keys, self.values
        return self._shown


def copies_itself(cache: object, config: PreTrainedConfig) -> bool:
    """Whether a cache that `generate` has made copies itself at every token, and is of the kind that `roomy_cache` can replace."""
    expected = [type(layer) for layer in _own_cache(config).layers]
    return type(cache) is DynamicCache and DynamicLayer in expected and [type(layer) for layer in cache.layers] == expected


def roomy_cache(config: PreTrainedConfig) -> DynamicCache:
    """The cache that `generate` makes by itself, with room in those layers that would grow by copying."""
    cache = _own_cache(config)
    roomy: type[Any] = RoomyLayer
    cache.layers = [roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def expect(cache: object, positions: int) -> None:
    """Tell a cache how many positions it will hold at most, so that its buffers take no memory for more."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, RoomyLayer):
            layer.most = positions


def _own_cache(config: PreTrainedConfig) -> DynamicCache:
    return DynamicCache(config=config.get_text_config(decoder=True))


def _roomier(states: torch.Tensor, positions: int) -> torch.Tensor:
    """A buffer for so many positions that begins with the states."""
    *rows_and_heads, length, width = states.shape
    buffer = states.new_empty((*rows_and_heads, positions, width))
    buffer[..., :length, :] = states
    return buffer
