"""From phrases near a query to the values at stake.

On labelled situations an index of texts that point at several values beats any comparison with the values' names or definitions.
How the phrases' votes are weighed is solved by kernel ridge regression (`kernel`); scores are calibrated probabilities (`calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from langchain_core.runnables import RunnableConfig

from vispa_graph.errors import NonFiniteError
from vispa_graph.taxonomy_index import kernel
from vispa_graph.taxonomy_index.calibration import calibrated
from vispa_graph.taxonomy_index.encoder import Floats
from vispa_graph.taxonomy_index.index import Hit, TaxonomyIndex
from vispa_graph.waiting import Steps

# Chosen on the tuning half with the kernel: of more, the many that are far outweigh the few that are near.
CANDIDATES = 100
# A slower model judges at most so many values: all that are shipped, and the best of a larger taxonomy.
CONSIDERED = 64
_LIKE = {"definition": "is about", "facet": "about", "sentence": "as in", "concern": "like", "situation": "like"}


@dataclass(frozen=True)
class Selected:
    """A value and why it is at stake.

    Attributes:
        score: 0..1; of the default selector the probability that the value is at stake.
        reason: The phrase that spoke for it most, or the words of the model that judged it.
    """

    value: str
    score: float
    reason: str


@runtime_checkable
class Selector(Protocol):
    """Judges how much each value is at stake in a text."""

    def rank(self, query: str, hits: Sequence[Hit], config: RunnableConfig | None = None) -> list[Selected]:
        """The values considered, best first.

        Args:
            query: The text.
            hits: The phrases nearest to it.
            config: Callbacks for models that are called.
        """


@runtime_checkable
class AwaitedSelector(Selector, Protocol):
    """A selector that waits for a model which runs elsewhere."""

    def judge(self, query: str, hits: Sequence[Hit], config: RunnableConfig | None = None) -> Steps[list[Selected]]:
        """As `rank`, in steps."""


class PhraseSelector:
    """The default: the phrases near the query vote. No model but the sentence encoder."""

    def __init__(self, index: TaxonomyIndex) -> None:
        self._index = index

    def rank(self, query: str, hits: Sequence[Hit], config: RunnableConfig | None = None) -> list[Selected]:
        """All values of the taxonomy, best first; equal scores in its order."""
        return vote(hits, self._index.pull, self._index.taxonomy.ids)


def vote(hits: Sequence[Hit], pull: Floats, values: Sequence[str]) -> list[Selected]:
    """All values, best first; equal scores in the order given.

    A value's evidence is the sum over the hits of kernel times pull: from about 0 (nothing near the query points at it) to about 1 (the
    query is a phrase that does). Its logarithm gives the probability.

    Args:
        hits: Phrases near a query.
        pull: The pull of every phrase of the index, [phrases, values].
        values: The values of the columns.
    """
    if not hits:
        return [Selected(value, 0.0, _reason(None)) for value in values]
    said = shares(hits, pull)
    evidence = np.round(said.sum(axis=0).clip(0), 5)  # so that what is equal has an equal score
    scores = calibrated(evidence)
    loudest = said.argmax(axis=0)
    selected = [
        Selected(value, round(float(scores[column]), 4), _reason(hits[loudest[column]] if said[loudest[column], column] > 0 else None))
        for column, value in enumerate(values)
    ]
    order = np.argsort(-evidence, kind="stable")
    return [selected[place] for place in order]


def shares(hits: Sequence[Hit], pull: Floats) -> Floats:
    """What each hit adds to the evidence for each value, [hits, values]."""
    weights = kernel.kernel(np.array([hit.score for hit in hits], dtype=np.float32))
    return np.asarray(weights[:, None] * pull[[hit.row for hit in hits]], dtype=np.float32)


def _reason(hit: Hit | None) -> str:
    return "no phrase near the query points at it" if hit is None else f'{_LIKE[hit.phrase.kind]} "{hit.phrase.text}"'


def choose(ranked: Sequence[Selected], k: int, *, min_score: float = 0.0, diversity: float = 0.0, likeness: Floats | None = None) -> list[Selected]:
    """At most k values of at least a score: the best, or with diversity a trade of score against likeness to those chosen before.

    Maximal marginal relevance (Carbonell and Goldstein 1998): the next value is the one with the highest
    (1 - diversity) * score - diversity * (its greatest likeness to a value chosen before).

    Args:
        ranked: Values, best first.
        k: The most to choose.
        min_score: 0..1; values below it are left out, so that fewer than k or none may be chosen.
        diversity: 0 (score alone) to 1 (unlikeness alone).
        likeness: How like the ranked values are, 0..1, [ranked, ranked]; needed where diversity is above 0.
    """
    left = [place for place, selected in enumerate(ranked) if selected.score >= min_score]
    if not diversity or likeness is None:
        return [ranked[place] for place in left[:k]]
    chosen: list[int] = []
    while left and len(chosen) < k:
        gains = [
            (1 - diversity) * ranked[place].score - diversity * max((float(likeness[place, other]) for other in chosen), default=0.0)
            for place in left
        ]
        chosen.append(left.pop(int(np.argmax(gains))))
    return [ranked[place] for place in chosen]


def considered(ranked: Sequence[Selected]) -> Sequence[Selected]:
    """The values that a slower model judges: the best of the default selector's."""
    return ranked[:CONSIDERED]


def in_order(judged: Sequence[Selected]) -> list[Selected]:
    """Best first, scores rounded; equal scores in the order given.

    Raises:
        NonFiniteError: A score is no number.
    """
    if not all(math.isfinite(s.score) for s in judged):
        raise NonFiniteError("The reranker's scores are not finite, so they rank nothing. Choose another model, or another device for it.")
    return sorted((replace(s, score=round(s.score, 4)) for s in judged), key=lambda s: -s.score)
