"""The state machine: nodes and edges."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.types import Checkpointer

from vispa_graph.engine.contract import Engine
from vispa_graph.errors import SettingsError
from vispa_graph.nodes import distributional, overton, rerank, retrieve, steer, steerable
from vispa_graph.nodes import review as review_node
from vispa_graph.plural_graph import PluralGraph
from vispa_graph.privacy import Scrubber
from vispa_graph.provenance import of_one_run
from vispa_graph.resources import Resources
from vispa_graph.settings import Settings
from vispa_graph.state import MODES, Door, Mode, Output, State
from vispa_graph.tasks import aone_task_per_value, one_task_per_value
from vispa_graph.taxonomy_index import Encoder, Taxonomy
from vispa_graph.tracing import Untraced, Waiting

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel


def create_graph(
    settings: Settings | None = None,
    *,
    main_llm: BaseChatModel | None = None,
    checkpointer: Checkpointer = None,
    review: bool = False,
    engine: Engine | None = None,
    encoder: Encoder | None = None,
    taxonomy: Taxonomy | None = None,
    scrubber: Scrubber | None = None,
    resources: Resources | None = None,
) -> PluralGraph:
    """START > retrieve > rerank > [review] > steer, once per value > overton | steerable | distributional > END.

    Args:
        settings: None for the defaults: the embedded models, no network.
        main_llm: Any LangChain chat model to aggregate with; None for the local model, unsteered.
        checkpointer: Where runs and conversations are kept; needed to resume, and for review. Inside another graph, that graph's keeps its
            runs; True keeps its conversations there too, so that follow-ups are read with earlier questions; False keeps nothing anywhere.
        review: Whether to stop before steering for a person to edit the values; needs a checkpointer, or a graph around this one that has one.
        engine, encoder, taxonomy: Parts to use instead of those the settings name.
        scrubber: Takes identifiers out of the texts that traces hold where `Settings(trace_content=True)` lets them.
        resources: All parts at once, to share them between graphs; excludes the others.

    Returns:
        A compiled LangGraph graph. Models are loaded when it first runs. `close()` lets go of them.

    Raises:
        SettingsError: Resources were given together with a part of them, or something else than `Settings` for the settings.
        SelectionSizeError: More values are to be heard than the taxonomy holds.
    """
    if resources is not None and any(part is not None for part in (settings, main_llm, engine, encoder, taxonomy, scrubber)):
        raise SettingsError("create_graph was given resources and, beside them, a part that resources hold. Give either the resources or the parts.")
    if resources is None:
        resources = Resources(
            Settings() if settings is None else settings, engine=engine, encoder=encoder, taxonomy=taxonomy, main_llm=main_llm, scrubber=scrubber
        )
    resources.check_top_k()
    builder = StateGraph(State, input_schema=Door, output_schema=Output)
    builder.add_node("retrieve", partial(retrieve, resources=resources))
    builder.add_node("rerank", Waiting("rerank", of_one_run(rerank, resources)))
    builder.add_node("steer", Waiting("steer", partial(steer, resources=resources)))
    for node in (overton, steerable, distributional):
        builder.add_node(node.__name__, Waiting(node.__name__, of_one_run(node, resources)))

    builder.add_edge(START, "retrieve")
    builder.add_edge("retrieve", "rerank")
    selected_by = "rerank"
    if review:
        builder.add_node("review", of_one_run(review_node, resources))
        builder.add_edge("rerank", "review")
        selected_by = "review"
    without_comments = [] if resources.settings.distribution == "comments" else ["distributional"]
    tasks = Untraced("one task per value", partial(one_task_per_value, resources=resources), partial(aone_task_per_value, resources=resources))
    builder.add_conditional_edges(selected_by, tasks, ["steer", *without_comments])
    builder.add_conditional_edges("steer", Untraced("by mode", by_mode), list(MODES))
    for mode in MODES:
        builder.add_edge(mode, END)
    return PluralGraph.opened(builder.compile(checkpointer=checkpointer, name="vispa"), resources)


def by_mode(state: State, config: RunnableConfig) -> Mode:
    """The aggregation node of the mode."""
    return state["mode"]
