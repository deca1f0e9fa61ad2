"""What is read for a value: its contrastive pairs as prompts, and which of them are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import numpy.typing as npt

from vispa_graph.engine.contract import Message, Reading
from vispa_graph.prompts import load_prompt
from vispa_graph.taxonomy_index.taxonomy import Pair

Prompt = str | list[Message]
Mask = npt.NDArray[np.bool_]

# How many sentences of one side a chat reading holds.
_READ_TOGETHER = 4
# The share of the pairs that the paper's code trains on; the rest is for validation.
_TRAINED = 0.7


@dataclass(frozen=True)
class Twins:
    """The prompts of one value. positives[i] and negatives[i] are twins.

    Attributes:
        held: [pairs], which pairs a fit that measures accuracy must not see; none where there are too few.
    """

    positives: tuple[Prompt, ...]
    negatives: tuple[Prompt, ...]
    held: Mask


def make_twins(pairs: Sequence[Pair], reading: Reading) -> Twins:
    """The pairs as they are read: bare sentences, or in a chat."""
    positives, negatives = [pair.positive for pair in pairs], [pair.negative for pair in pairs]
    if reading == "raw":
        return Twins(tuple(positives), tuple(negatives), _held_out(np.arange(len(pairs))))
    return Twins(tuple(_as_chat(positives)), tuple(_as_chat(negatives)), _held_out(np.arange(len(pairs)) % _apart(len(pairs))))


def digest(twins: Twins, others: Sequence[Twins]) -> str:
    """SHA-256 over everything that is read to fit a value: its own prompts and the positives it is set against."""
    read = [twins.positives, twins.negatives, [other.positives for other in others]]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def _held_out(groups: npt.NDArray[np.int_]) -> Mask:
    """A mask over the pairs, in which pairs of one group stay together; the same for the same groups."""
    names = np.unique(groups)
    kept = round((1 - _TRAINED) * len(names))
    if kept == 0 or len(names) - kept < 2:
        return np.zeros(len(groups), dtype=bool)
    return np.isin(groups, np.random.default_rng(0).permutation(names)[:kept])


def _apart(count: int) -> int:
    """How far apart the sentences of a chat stand in their list: a quarter of it, so that they differ, also in form."""
    return max(1, count // _READ_TOGETHER)


def _as_chat(side: Sequence[str]) -> list[Prompt]:
    """Each sentence, with three more of its side, before a situation, inside a user's turn; twins get the same situation.

    A small model does not tell a value from one sentence, but from several that have nothing else in common. Sentences that share a
    chat share all their chats, so that some can be held out.
    """
    situations = (resources.files("vispa_graph.prompts") / "reading_situations.txt").read_text(encoding="utf-8").splitlines()
    conversations: list[Prompt] = []
    for number in range(len(side)):
        together = side[number % _apart(len(side)) :: _apart(len(side))]
        first = number // _apart(len(side))
        read = " ".join(together[(first + place) % len(together)] for place in range(_READ_TOGETHER))
        request = load_prompt("comment").render(text=situations[number % len(situations)])
        conversations.append([{"role": "user", "content": f"{read} {request}"}])
    return conversations
