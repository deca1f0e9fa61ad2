"""The selection alone: which values a text puts at stake."""

from __future__ import annotations

from vispa_graph.errors import EmptyQueryError, SelectionSizeError
from vispa_graph.resources import Resources
from vispa_graph.settings import Settings
from vispa_graph.taxonomy_index.retriever import CANDIDATES
from vispa_graph.taxonomy_index.selection import Selected, rank


def select_values(query: str, k: int = 6, *, settings: Settings | None = None, resources: Resources | None = None) -> list[Selected]:
    """The k values most at stake in a text, best first, each with a score in 0..1 and a reason.

    No language model is loaded, only the sentence encoder and the index.

    Args:
        query: A question or a situation.
        k: 1 to the size of the taxonomy.
        settings: None for the defaults.
        resources: Those of a graph, to use its index instead of opening it again.

    Raises:
        EmptyQueryError: The query is blank.
        SelectionSizeError: k is out of range.
    """
    if not query.strip():
        raise EmptyQueryError("The query is empty. Give a question or a situation.")
    found = resources or Resources(settings or Settings())
    if not 1 <= k <= len(found.taxonomy):
        raise SelectionSizeError(f"k is {k}, but must be 1 to {len(found.taxonomy)}, the number of values in the taxonomy.")
    return rank(found.index.search(query, CANDIDATES), found.taxonomy.ids)[:k]
