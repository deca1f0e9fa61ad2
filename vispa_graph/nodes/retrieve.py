"""Find the phrases of the taxonomy nearest to the query."""

from __future__ import annotations

from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.types import Overwrite

from vispa_graph.resources import Resources
from vispa_graph.state import Candidate, State


def retrieve(state: State, config: RunnableConfig, *, resources: Resources) -> dict[str, Any]:
    """Candidates for the selection, and a clean slate for what the run will add; none where the caller named the values."""
    notes = [f"The input key {key!r} is not known and was ignored." for key in state["ignored"]]
    if resources.profile.note:
        notes.append(resources.profile.note)
    # A thread may go on for several turns: what an earlier one added must not mix with this one.
    fresh: dict[str, Any] = {"comments": Overwrite([]), "distribution": None, "chosen": None, "attribution": []}
    if state["asked"] is not None:
        return fresh | {"candidates": [], "notes": Overwrite(notes)}
    from vispa_graph.taxonomy_index.retriever import TaxonomyRetriever

    if not resources.encoder.fits(state["query"]):
        notes.append("The text is longer than the sentence encoder reads, so the values were selected by its beginning.")
    documents = TaxonomyRetriever(index=resources.index).invoke(state["query"], config)
    candidates = [
        Candidate(
            text=d.page_content,
            kind=d.metadata["kind"],
            source=d.metadata["source"],
            values=d.metadata["values"],
            score=d.metadata["score"],
            row=d.metadata["row"],
        )
        for d in documents
    ]
    return fresh | {"candidates": candidates, "notes": Overwrite(notes)}
