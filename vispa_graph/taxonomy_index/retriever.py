"""LangChain retrievers over the taxonomy index: viewers show both steps of the selection with their documents and scores."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun, Callbacks
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig
from pydantic import ConfigDict, Field

from vispa_graph.taxonomy_index.index import Hit, TaxonomyIndex
from vispa_graph.taxonomy_index.selection import CANDIDATES, AwaitedSelector, Selector, choose
from vispa_graph.waiting import Steps, arun_steps, run_steps


class TaxonomyRetriever(BaseRetriever):
    """The phrases of the taxonomy nearest to a query, as documents: the text, and score, kind, source, values and row as metadata."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    index: TaxonomyIndex = Field(repr=False)
    n: int = CANDIDATES

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [
            Document(
                page_content=hit.phrase.text,
                metadata={
                    "score": hit.score,
                    "kind": hit.phrase.kind,
                    "source": hit.phrase.source,
                    "values": dict(hit.phrase.weights),
                    "row": hit.row,
                },
            )
            for hit in self.index.search(query, self.n)
        ]


class ValueReranker(BaseRetriever):
    """The values at stake, best first, from candidates that a retriever found; one document a value, its definition as text.

    Give the candidates with each call: `reranker.invoke(query, candidates=documents)`. Metadata says what moved and why: `rank` from 1,
    `retrieved` the place that the nearest phrase gave the value, `reason` the phrase that spoke for it.

    Attributes:
        k: The most values to choose.
        min_score: 0..1; values that score lower are left out.
        diversity: 0..1; how much unlikeness to the values chosen before counts against the score.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    index: TaxonomyIndex = Field(repr=False)
    selector: Selector = Field(repr=False)
    k: int
    min_score: float = 0.0
    diversity: float = 0.0

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, candidates: list[Document] | None = None, **_: Any
    ) -> list[Document]:
        return run_steps(self._ranked(query, candidates, run_manager.get_child()))

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, candidates: list[Document] | None = None, **_: Any
    ) -> list[Document]:
        return await arun_steps(self._ranked(query, candidates, run_manager.get_child()))

    def _ranked(self, query: str, candidates: list[Document] | None, callbacks: Callbacks) -> Steps[list[Document]]:
        if candidates is None:
            hits = self.index.search(query, CANDIDATES)
        else:
            hits = [Hit(self.index.phrases[d.metadata["row"]], d.metadata["score"], d.metadata["row"]) for d in candidates]
        config: RunnableConfig = {"callbacks": callbacks}
        if isinstance(self.selector, AwaitedSelector):
            ranked = yield from self.selector.judge(query, hits, config)
        else:
            ranked = self.selector.rank(query, hits, config)
        likeness = self.index.likeness([selected.value for selected in ranked]) if self.diversity else None
        places = {value: place for place, value in enumerate(dict.fromkeys(value for hit in hits for value in hit.phrase.weights), 1)}
        chosen = choose(ranked, self.k, min_score=self.min_score, diversity=self.diversity, likeness=likeness)
        return [
            Document(
                page_content=self.index.taxonomy[selected.value].definition,
                metadata={
                    "value": selected.value,
                    "score": selected.score,
                    "reason": selected.reason,
                    "rank": place,
                    "retrieved": places.get(selected.value),
                },
            )
            for place, selected in enumerate(chosen, 1)
        ]
