"""Where a few attention heads are told to look while multiple choice is trained.

To answer with a letter takes three look-ups in a row: an option gathers its letter, the answer gathers what the passage says, and finds the option
that says so. From the letters alone, one target in a document, a model this small does not find that in tens of millions of tokens. So for each
look-up one head is shown where to look, by the cross-entropy of its attention; training/matching.py gives a start to what it carries from there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tokenizers import Encoding
from torch import nn

# (block, head) of each look-up; blocks in the order in which one look-up needs the other's result.
LETTER_OF_OPTION, PASSAGE_OF_ANSWER, OPTION_OF_ANSWER = (2, 3), (3, 3), (4, 3)
OPTION = re.compile(r"^([A-Z])\. (.+)$", re.MULTILINE)
# What the answer follows from: the last sentence of the passage, or the words whose letter is asked.
ASKED = re.compile(r"[^.!?\n]+[.!?]?(?=\n</passage>)|(?<=Which letter says: ).+")


class Link(NamedTuple):
    """A token that shall attend to a stretch of tokens, at one head."""

    head: tuple[int, int]
    query: int
    start: int
    end: int

    def moved(self, by: int) -> Link:
        """The link in a document in which its text begins so many tokens later."""
        return self._replace(query=self.query + by, start=self.start + by, end=self.end + by)


def tokens_of(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """The tokens that a stretch of the text's characters lies in, as (first, last + 1)."""
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is None or last is None:
        raise ValueError(f"no token covers the characters {start} to {end}")
    return first, last + 1


def option_links(text: str, encoding: Encoding) -> list[Link]:
    """Of each token of a lettered option, to the option's letter."""
    links = []
    for option in OPTION.finditer(text):
        letter, _ = tokens_of(encoding, *option.span(1))
        first, end = tokens_of(encoding, *option.span(2))
        links += [Link(LETTER_OF_OPTION, token, letter, letter + 1) for token in range(first, end)]
    return links


def answer_links(text: str, encoding: Encoding, letter: str, query: int) -> list[Link]:
    """Of the token that the letter follows, at `query`, to the option of that letter and to what it follows from."""
    links = [Link(OPTION_OF_ANSWER, query, *tokens_of(encoding, *option.span(2))) for option in OPTION.finditer(text) if option[1] == letter]
    return links + [Link(PASSAGE_OF_ANSWER, query, *tokens_of(encoding, *said.span())) for said in ASKED.finditer(text)]


class Guide:
    """Keeps the attention of the guided heads while the model runs, and tells what they miss.

    Args:
        blocks: The model's decoder blocks, with eager attention, which returns its weights.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._weights: dict[int, torch.Tensor] = {}
        for block in sorted({head[0] for head in (LETTER_OF_OPTION, PASSAGE_OF_ANSWER, OPTION_OF_ANSWER)}):
            blocks[block].self_attn.register_forward_hook(lambda _module, _inputs, output, block=block: self._weights.__setitem__(block, output[1]))

    def loss(self, links: Sequence[tuple[int, Link]]) -> torch.Tensor:
        """Mean cross-entropy, in nats, of the attention that the links of a batch ask for, as (row, link); each head counts alike."""
        losses = []
        for head in sorted({link.head for _, link in links}):
            own = [(row, link) for row, link in links if link.head == head]
            block, number = head
            rows = torch.tensor([row for row, _ in own])
            queries, starts, ends = (torch.tensor([getattr(link, name) for _, link in own]) for name in ("query", "start", "end"))
            attention = self._weights[block][rows, number, queries]
            places = torch.arange(attention.shape[-1])
            there = (places >= starts[:, None]) & (places < ends[:, None])
            losses.append(-(attention * there).sum(-1).clamp(min=1e-30).log().mean())
        return torch.stack(losses).mean()
