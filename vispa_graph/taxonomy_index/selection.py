"""From phrases near a query to the values at stake: facets and concerns vote.

On labelled situations an index of kinds of situations that point at values beats any comparison with the values' names or
definitions, so the concerns carry most of the vote; facets find what the bank of concerns does not know.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from vispa_graph.taxonomy_index.index import Hit

# Tuned on the tuning half of benchmarks/data/labelled_situations.yaml (python -m benchmarks.selection --half tune).
CONCERN_TEMPERATURE = 0.05
CONCERN_SHARE = 0.5
FACETS_COUNTED = 2


@dataclass(frozen=True)
class Selected:
    """A value and why it is at stake.

    Attributes:
        score: 0..1; the share of the concerns' vote and the mean cosine of its best facets, mixed.
        reason: The phrase that spoke for it most, readable.
    """

    value: str
    score: float
    reason: str


def rank(hits: Sequence[Hit], values: Sequence[str]) -> list[Selected]:
    """All values, best first; equal scores in the order given.

    A concern votes for its values with a softmax weight over the cosines of all concerns' phrasings; a value's facets speak with
    the mean cosine of the best two. The two are mixed with `CONCERN_SHARE`.
    """
    concerns = [hit for hit in hits if hit.phrase.kind == "concern"]
    own: dict[str, list[Hit]] = defaultdict(list)
    for hit in hits:
        if hit.phrase.kind != "concern":
            own[hit.phrase.source].append(hit)
    votes: dict[str, float] = defaultdict(float)
    spoke: dict[str, tuple[float, str]] = {}
    top = max((hit.score for hit in concerns), default=0.0)
    weights = [math.exp((hit.score - top) / CONCERN_TEMPERATURE) for hit in concerns]
    total = sum(weights) or 1.0
    for hit, weight in zip(concerns, weights, strict=True):
        for value, strength in hit.phrase.weights.items():
            votes[value] += strength * weight / total
            spoke[value] = max(spoke.get(value, (0.0, "")), (strength * weight / total, f'like "{hit.phrase.text}"'))
    share = CONCERN_SHARE if concerns else 0.0
    selected = []
    for value in values:
        best = sorted((hit.score for hit in own.get(value, ())), reverse=True)[:FACETS_COUNTED]
        facet = max(0.0, sum(best) / FACETS_COUNTED)
        score = share * votes[value] + (1 - share) * facet
        reason = spoke.get(value, (0.0, ""))
        if best and (1 - share) * facet > share * reason[0]:
            nearest = max(own[value], key=lambda hit: hit.score)
            text = f'about "{nearest.phrase.text}"'
        else:
            text = reason[1] or "no phrase near the query points at it"
        selected.append(Selected(value, round(min(max(score, 0.0), 1.0), 4), text))
    return sorted(selected, key=lambda s: -s.score)
