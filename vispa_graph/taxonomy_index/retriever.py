"""LangChain retrievers over the taxonomy index: viewers show both steps of the selection with their documents and scores."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field

from vispa_graph.taxonomy_index.index import Hit, Phrase, TaxonomyIndex
from vispa_graph.taxonomy_index.selection import rank

# Every phrase takes part in the vote with a weight that falls off fast; beyond these it is nothing.
CANDIDATES = 200


class TaxonomyRetriever(BaseRetriever):
    """The phrases of the taxonomy nearest to a query, as documents: the text, and score, kind, source and values as metadata."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    index: TaxonomyIndex = Field(repr=False)
    n: int = CANDIDATES

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [
            Document(
                page_content=hit.phrase.text,
                metadata={"score": hit.score, "kind": hit.phrase.kind, "source": hit.phrase.source, "values": dict(hit.phrase.weights)},
            )
            for hit in self.index.search(query, self.n)
        ]


class ValueReranker(BaseRetriever):
    """The values at stake, best first, from candidates that a retriever found; one document a value, its definition as text.

    Give the candidates with each call: `reranker.invoke(query, candidates=documents)`. Metadata says what moved and why: `rank` from 1,
    `retrieved` the place that the nearest phrase gave the value, `reason` the phrase that spoke for it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    index: TaxonomyIndex = Field(repr=False)
    k: int

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, candidates: list[Document] | None = None, **_: Any
    ) -> list[Document]:
        hits = [
            Hit(Phrase(d.page_content, d.metadata["kind"], d.metadata["source"], d.metadata["values"]), d.metadata["score"])
            for d in (candidates if candidates is not None else [])
        ] or self.index.search(query, CANDIDATES)
        taxonomy = self.index.taxonomy
        places = {value: place for place, value in enumerate(dict.fromkeys(value for hit in hits for value in hit.phrase.weights), 1)}
        return [
            Document(
                page_content=taxonomy[selected.value].definition,
                metadata={
                    "value": selected.value,
                    "score": selected.score,
                    "reason": selected.reason,
                    "rank": place,
                    "retrieved": places.get(selected.value),
                },
            )
            for place, selected in enumerate(rank(hits, taxonomy.ids)[: self.k], 1)
        ]
