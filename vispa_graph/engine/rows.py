"""Texts laid out for reading, so that what two of them begin with is read once.

Contrastive twins begin alike. A row may hold two texts: the tokens that both begin with, the rest of the one, and the rest of the other, which
does not see the one's rest and whose positions go on from the common tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch

# Shorter beginnings are not worth the wider row.
_WORTH = 4
# The most tokens of a row with two texts and of those beside it, so that no architecture's sliding window (from 128 tokens) is narrower: the mask
# that keeps texts apart takes the place of the window's.
WIDEST = 128


@dataclass(frozen=True)
class Row:
    """One text, or two that begin alike.

    Attributes:
        texts: Which texts.
        tokens: The tokens that both begin with, the rest of the first, the rest of the second; of one text all are common.
        common: How many both begin with.
        first: How many are the rest of the first.
    """

    texts: tuple[int, ...]
    tokens: list[int]
    common: int
    first: int = 0

    @property
    def ends(self) -> tuple[int, ...]:
        """The place of each text's last token."""
        return (self.common + self.first - 1, len(self.tokens) - 1)[-len(self.texts) :]


def single_rows(texts: Sequence[Sequence[int]]) -> list[Row]:
    """Each text, in tokens, in a row of its own."""
    return [Row((number,), list(text), len(text)) for number, text in enumerate(texts)]


def shared_rows(texts: Sequence[Sequence[int]], widest: int = WIDEST) -> list[Row]:
    """Texts, in tokens, two in a row where they begin alike, those with the longest beginning first to be put together.

    Args:
        widest: The most tokens of a row with two texts.
    """
    order = sorted(range(len(texts)), key=lambda number: list(texts[number]))
    likeness = [(_common(texts[one], texts[other]), one, other) for one, other in pairwise(order)]
    rows, alone = [], set(order)
    for common, one, other in sorted(likeness, key=lambda found: -found[0]):
        both = [*texts[one], *texts[other][common:]]
        if common >= _WORTH and len(both) <= widest and {one, other} <= alone:
            rows.append(Row((one, other), both, common, len(texts[one]) - common))
            alone -= {one, other}
    return rows + [Row((number,), list(texts[number]), len(texts[number])) for number in sorted(alone)]


def laid_out(rows: Sequence[Row], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and which of them are no padding, both [rows, width]; padded right, where positions count from the first token everywhere."""
    width = max(len(row.tokens) for row in rows)
    ids = torch.full((len(rows), width), pad)
    real = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row.tokens)] = torch.tensor(row.tokens)
        real[number, : len(row.tokens)] = 1
    return ids, real


def apart(rows: Sequence[Row], width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What keeps the two texts of a row apart: what is added to the attention scores [rows, 1, width, width], and the positions [rows, width].

    Padding is at position 0: there may be fewer positions than the row is wide.
    """
    common, middle = (torch.tensor(numbers)[:, None] for numbers in zip(*((row.common, row.common + row.first) for row in rows), strict=True))
    place = torch.arange(width)[None]
    in_first, in_second = (place >= common) & (place < middle), place >= middle
    later = place[:, None] > place[..., None]
    hidden = later | (in_second[..., None] & in_first[:, None])
    scores = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    length = torch.tensor([len(row.tokens) for row in rows])[:, None]
    return scores[:, None], torch.where(place < length, place - torch.where(in_second, middle - common, 0), 0)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
