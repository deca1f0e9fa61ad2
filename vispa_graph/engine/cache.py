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

    _buffers: tuple[torch.Tensor, torch.Tensor]
    _shown: torch.Tensor | None = None  # the keys as last returned: others than these have been changed by somebody else

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states; returns all so far."""
        length = self.get_seq_length()
        if length == 0 or self.keys is None or self.values is None:
            return super().update(key_states, value_states, *args, **kwargs)
        end = length + key_states.shape[-2]
        if self.keys is not self._shown or end > self._buffers[0].shape[-2]:
            self._buffers = _roomier(self.keys, end), _roomier(self.values, end)
        keys, values = self._buffers
        keys[..., length:end, :] = key_states
        values[..., length:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        self._shown = self.keys
        return self.keys, self.values


def copies_itself(cache: object) -> bool:
    """Whether a cache that `generate` has made can be replaced by a roomy one."""
    return type(cache) is DynamicCache and any(type(layer) is DynamicLayer for layer in cache.layers)


def roomy_cache(config: PreTrainedConfig) -> DynamicCache:
    """The cache that `generate` makes by itself, with room in those layers that would grow by copying."""
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    roomy: type[Any] = RoomyLayer
    cache.layers = [roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _roomier(states: torch.Tensor, end: int) -> torch.Tensor:
    """A buffer for `end` positions and more that begins with the states."""
    *rows_and_heads, length, width = states.shape
    buffer = states.new_empty((*rows_and_heads, end + _ROOM, width))
    buffer[..., :length, :] = states
    return buffer
