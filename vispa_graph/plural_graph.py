"""The compiled graph with what LangGraph's own has not: a door that checks what comes in, a guard on traces, steps written before the next begins."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command

from vispa_graph.privacy import Guard
from vispa_graph.resources import Resources
from vispa_graph.state import Door, Input, Output, State, check_input
from vispa_graph.threads import check_command, check_thread, durable, told_plainly

# Sync tasks of a step run in threads; the engine, not the thread pool, must decide how many comments are made at once.
_CONCURRENCY = 256


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
        options = durable(kwargs, self.checkpointer, guard.config["configurable"])
        with told_plainly(self.checkpointer, is_async=False):
            yield from guard.each(super(PluralGraph, graph).stream(checked, guard.config, **options))

    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """As in LangGraph, with the input checked first, and private."""
        checked = self._checked(input, config)
        graph, guard = self._guarded(checked, config, is_async=True)
        options = durable(kwargs, self.checkpointer, guard.config["configurable"])
        with told_plainly(self.checkpointer, is_async=True):
            async with aclosing(guard.aeach(super(PluralGraph, graph).astream(checked, guard.config, **options))) as parts:
                async for part in parts:
                    yield part

    def _checked(self, data: Any, config: RunnableConfig | None) -> Any:
        """The checked input; None and commands, which resume a run, pass where there is one to resume."""
        if isinstance(data, Command):
            check_command(data)
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
