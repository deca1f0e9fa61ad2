"""The state machine: nodes, edges, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command, Send

from vispa_graph.attributes import ATTRIBUTE, read_attribute
from vispa_graph.conversation import in_context
from vispa_graph.engine.contract import Engine
from vispa_graph.errors import SettingsError
from vispa_graph.nodes import distributional, overton, rerank, retrieve, steer, steerable
from vispa_graph.nodes import review as review_node
from vispa_graph.privacy import Guard, Scrubber
from vispa_graph.prompts import load_prompt
from vispa_graph.provenance import engine_of, of_one_run
from vispa_graph.resources import Resources
from vispa_graph.settings import Settings
from vispa_graph.state import MODES, Door, Input, Mode, Output, State, SteerTask, check_input
from vispa_graph.taxonomy_index import Encoder, Taxonomy
from vispa_graph.threads import check_thread, told_plainly
from vispa_graph.tracing import Untraced, Waiting

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from langgraph.checkpoint.base import BaseCheckpointSaver

# Sync tasks of a step run in threads; the engine, not the thread pool, must decide how many comments are made at once.
_CONCURRENCY = 256


def create_graph(
    settings: Settings | None = None,
    *,
    main_llm: BaseChatModel | None = None,
    checkpointer: BaseCheckpointSaver[Any] | None = None,
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
        checkpointer: Where runs and conversations are kept; needed to resume, and for review.
        review: Whether to stop before steering for a person to edit the values; needs a checkpointer, or a graph around this one that has one.
        engine, encoder, taxonomy: Parts to use instead of those the settings name.
        scrubber: Takes identifiers out of the texts that traces hold where `Settings(trace_content=True)` lets them.
        resources: All parts at once, to share them between graphs; excludes the others.

    Returns:
        A compiled LangGraph graph. Models are loaded when it first runs. `close()` lets go of them.

    Raises:
        SettingsError: Resources were given together with a part of them.
        SelectionSizeError: More values are to be heard than the taxonomy holds.
    """
    if resources is not None and any(part is not None for part in (settings, main_llm, engine, encoder, taxonomy, scrubber)):
        raise SettingsError("create_graph was given resources and, beside them, a part that resources hold. Give either the resources or the parts.")
    if resources is None:
        resources = Resources(settings or Settings(), engine=engine, encoder=encoder, taxonomy=taxonomy, main_llm=main_llm, scrubber=scrubber)
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


def makes_comments(mode: Mode, settings: Settings) -> bool:
    """Whether a run in this mode makes comments: a distribution may be read without any."""
    return mode != "distributional" or settings.distribution == "comments"


def one_task_per_value(state: State, config: RunnableConfig, *, resources: Resources) -> list[Send] | str:
    """A steer task for every selected value. All get the same prompt: only the activations differ.

    A distribution that is read without comments needs none.
    """
    if not makes_comments(state["mode"], resources.settings):
        return "distributional"
    attribute = read_attribute(state["attribute"] or "")
    if state["mode"] == "steerable" and attribute.kind == "vrd":
        prompt = load_prompt("comment_attribute").render(attribute=attribute.text, text=in_context(state))
    else:
        prompt = load_prompt("comment").render(text=in_context(state))
    made = resources.made_with | engine_of(resources)

    def task(value: str) -> SteerTask:
        asked = state["attribute"] if value == ATTRIBUTE else None
        return SteerTask(query=state["query"], prompt=prompt, value=value, attribute=asked, mode=state["mode"], made_with=made)

    return [Send("steer", task(selected["id"])) for selected in state["values"]]


async def aone_task_per_value(state: State, config: RunnableConfig, *, resources: Resources) -> list[Send] | str:
    """The same without holding up the event loop while the model loads."""
    return await asyncio.to_thread(one_task_per_value, state, config, resources=resources)


def by_mode(state: State, config: RunnableConfig) -> Mode:
    """The aggregation node of the mode."""
    return state["mode"]


class PluralGraph(CompiledStateGraph[State, None, Input, Output]):
    """A compiled graph that checks its input at the door: LangGraph itself drops unknown keys and misses absent ones silently."""

    resources: Resources

    @classmethod
    def opened(cls, compiled: CompiledStateGraph[Any, Any, Any, Any], resources: Resources) -> PluralGraph:
        """The compiled graph with a door; invoke, stream and batch, sync and async, all pass through it."""
        # `StateGraph.compile` has no way to name the class it makes.
        compiled.__class__ = cls
        graph = cast(PluralGraph, compiled)
        graph.resources = resources
        graph.config = {**(graph.config or {}), "max_concurrency": _CONCURRENCY}
        return graph

    def copy(self, update: dict[str, Any] | None = None) -> PluralGraph:
        """A copy, as `with_config` makes them."""
        attributes = {name: value for name, value in self.__dict__.items() if name not in ("__orig_class__", "resources")}
        copied = type(self)(**(attributes | (update or {})))
        copied.resources = self.resources
        return copied

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """As in LangGraph, with the input checked first, and private."""
        checked = self._checked(input, config)
        graph, guard = self._guarded(checked, config, is_async=False)
        with told_plainly(self.checkpointer, is_async=False):
            yield from guard.each(super(PluralGraph, graph).stream(checked, guard.config, **self._durable(kwargs)))

    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """As in LangGraph, with the input checked first, and private."""
        checked = self._checked(input, config)
        graph, guard = self._guarded(checked, config, is_async=True)
        with told_plainly(self.checkpointer, is_async=True):
            async with aclosing(guard.aeach(super(PluralGraph, graph).astream(checked, guard.config, **self._durable(kwargs)))) as parts:
                async for part in parts:
                    yield part

    def _checked(self, data: Any, config: RunnableConfig | None) -> Any:
        """The checked input; None and commands, which resume a run, pass where there is one to resume."""
        resumes = data is None or isinstance(data, Command)
        checked = data if resumes else check_question(data, self.resources)
        check_thread(data, self.checkpointer, self.config, config, reviews="review" in self.nodes)
        return checked

    def _guarded(self, checked: Any, config: RunnableConfig | None, *, is_async: bool) -> tuple[PluralGraph, Guard]:
        """The graph without callbacks of its own, and what keeps texts from them and from all others; tags say mode and method."""
        own = self.config or {}
        mode = [f"mode:{checked['mode']}"] if isinstance(checked, dict) else []  # a run that goes on knows it only once it runs
        tags = [*mode, f"method:{self.resources.method}"]
        bound: RunnableConfig = {"callbacks": own.get("callbacks"), "configurable": own.get("configurable") or {}}
        guard = self.resources.privacy.guard(bound, config, {"tags": tags}, is_async=is_async, joins=True)
        bare = {key: value for key, value in own.items() if key != "callbacks"}
        return (self.copy({"config": bare}) if own.get("callbacks") else self), guard

    def _durable(self, options: dict[str, Any]) -> dict[str, Any]:
        """Have each step written before the next one begins, unless the caller chose otherwise.

        LangGraph's default writes it while the next step runs already: comments finished before that would be lost with the process.
        """
        chosen = options.get("durability") is not None or "checkpoint_during" in options
        return options if chosen or not self.checkpointer else {**options, "durability": "sync"}

    def close(self) -> None:
        """Let go of the models. Idempotent."""
        self.resources.close()


def check_question(data: Any, resources: Resources) -> Door:
    """The checked input, for which nothing is loaded.

    Raises:
        InputError: See `check_input`; or it names values that the taxonomy does not hold.
    """
    door = check_input(data)
    resources.taxonomy.find_all(door["asked"] or ())
    return door
