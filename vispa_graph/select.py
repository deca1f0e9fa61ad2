"""The selection alone: which values a text puts at stake."""

from __future__ import annotations

from vispa_graph.errors import EmptyQueryError, SelectionSizeError
from vispa_graph.resources import Resources
from vispa_graph.settings import Settings
from vispa_graph.taxonomy_index.retriever import ValueReranker
from vispa_graph.taxonomy_index.selection import Selected


def select_values(query: str, k: int = 6, *, settings: Settings | None = None, resources: Resources | None = None) -> list[Selected]:
    """The values most at stake in a text, best first, each with a score in 0..1 and a reason.

    At most k, and none that scores below the settings' `min_score`: of a plain question such as "2+2" the list is empty. With
    `diversity`, values are chosen in the order in which they add most. Only what the settings' `reranker` needs is loaded: by default the
    sentence encoder and the index. As private as a run of the graph, whatever traces the caller.

    Args:
        query: A question or a situation.
        k: 1 to the size of the taxonomy.
        settings: None for the defaults.
        resources: Those of a graph, to use its index instead of opening it again.

    Raises:
        EmptyQueryError: The query is blank.
        SelectionSizeError: k is out of range.
        SelectionError: A language model judged, and what it wrote cannot be read.
    """
    if not query.strip():
        raise EmptyQueryError("The query is empty. Give a question or a situation.")
    found = resources or Resources(Settings() if settings is None else settings)
    if not 1 <= k <= len(found.taxonomy):
        raise SelectionSizeError(f"k is {k}, but must be 1 to {len(found.taxonomy)}, the number of values in the taxonomy.")
    chosen = found.settings
    reranker = ValueReranker(index=found.index, selector=found.selector, k=k, min_score=chosen.min_score, diversity=chosen.diversity)
    guard = found.privacy.guard()
    with guard:
        try:
            documents = reranker.invoke(query, guard.config)
        except Exception as error:
            guard.rethrow(error)
    return [Selected(d.metadata["value"], d.metadata["score"], d.metadata["reason"]) for d in documents]
