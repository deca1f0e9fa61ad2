"""Choose the values at stake."""

from __future__ import annotations

from typing import Any

from langchain_core.documents import Document
from langchain_core.runnables import RunnableConfig

from vispa_graph.conversation import in_context
from vispa_graph.errors import NoValuesError
from vispa_graph.resources import Resources
from vispa_graph.state import SelectedValue, State
from vispa_graph.taxonomy_index import Value
from vispa_graph.waiting import Steps, answer_of


def rerank(state: State, config: RunnableConfig, *, resources: Resources) -> Steps[dict[str, Any]]:
    """At most k values at stake with scores and reasons; the caller's own where it named them.

    A steerable attribute that names a value of the taxonomy, or that a direction can be fitted toward, is always heard, and first.

    Raises:
        UnknownValueError: The caller named a value that the taxonomy does not hold.
        NoValuesError: No value is at stake enough to be heard.
    """
    taxonomy, settings = resources.taxonomy, resources.settings
    if state["asked"] is not None:
        ids = dict.fromkeys(value.id for value in taxonomy.find_all(state["asked"]))
        selected = [_selected(taxonomy[value_id], 1.0, "named by the caller") for value_id in ids]
    else:
        from vispa_graph.taxonomy_index.retriever import ValueReranker

        candidates = [
            Document(page_content=c["text"], metadata={k: c[k] for k in ("kind", "source", "values", "score", "row")}) for c in state["candidates"]
        ]
        reranker = ValueReranker(
            index=resources.index,
            selector=resources.selector,
            k=settings.top_k,
            min_score=settings.min_score,
            diversity=settings.diversity if state["mode"] == "overton" else 0.0,
        )
        documents = yield from answer_of(reranker, in_context(state), config, candidates=candidates)
        selected = [_selected(taxonomy[d.metadata["value"]], d.metadata["score"], d.metadata["reason"]) for d in documents]
    if state["mode"] == "steerable" and (asked := resources.attribute_value(state["attribute"])):
        rest = [s for s in selected if s["id"] != asked.id]
        kept = rest if state["asked"] is not None else rest[: settings.top_k - 1]
        selected = [_selected(asked, 1.0, "the attribute asked for"), *kept]
    if not selected:
        raise NoValuesError(
            f"No value scores at least {settings.min_score:g} in this text, so none is heard: it may be a plain question, "
            "or not in English, which is all that the selection reads. Name values to hear, or lower min_score."
        )
    return {"values": selected}


def _selected(value: Value, score: float, reason: str) -> SelectedValue:
    return SelectedValue(id=value.id, name=value.name, family=value.family, source=value.source, score=score, reason=reason, weight=1.0)
