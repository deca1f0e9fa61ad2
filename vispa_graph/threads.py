"""On which thread a run goes, and which checkpointer keeps it; what cannot be kept or gone on with is refused before it begins.

LangGraph's own words for that would be hidden like any other error's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import CONFIG_KEYS, ensure_config
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.errors import EmptyInputError
from langgraph.types import Checkpointer, Command

from vispa_graph.errors import InputError, ThreadError

# Keys that LangGraph gives the runs inside a run: the checkpointer that counts there, how soon it writes where that was chosen, the task.
_INSIDE, _OUTER_SAVER, _OUTER_DURABILITY, _TASK = "__pregel_", "__pregel_checkpointer", "__pregel_durability", "__pregel_task_id"
# A run that names one of these has a thread of its own, whatever run is around it.
_THREAD = frozenset({"thread_id", "checkpoint_ns", "checkpoint_id", "checkpoint_map"})
_STOPS = "This graph stops for review, and without a checkpointer nothing could go on from there."


def configurable(*configs: RunnableConfig | None) -> dict[str, Any]:
    """What configurations hold for a run: with those of the run around, unless they name a thread of their own.

    A thread that an earlier configuration names, such as one bound to the graph, stays where a later one is that of a run around.
    """
    own: dict[str, Any] = {}
    for config in configs:
        given = _flat(config)
        if _TASK in given and _names_thread(own):
            given = {key: value for key, value in given.items() if key not in _THREAD and not key.startswith(_INSIDE)}
        own |= given
    if _names_thread(own):
        return own
    return {**ensure_config().get("configurable", {}), **{key: value for key, value in own.items() if key not in _THREAD}}


def _flat(config: RunnableConfig | None) -> dict[str, Any]:
    """As in LangChain, keys that no configuration has may stand beside the others."""
    beside = {key: value for key, value in (config or {}).items() if key not in CONFIG_KEYS and value is not None}
    return beside | ((config or {}).get("configurable") or {})


def _names_thread(chosen: dict[str, Any]) -> bool:
    return any(chosen.get(key) is not None for key in _THREAD)


def saver_that_counts(own: Checkpointer, chosen: dict[str, Any]) -> BaseCheckpointSaver[Any] | None:
    """The checkpointer that keeps a run: that of the graph around, unless the run has a thread of its own.

    Args:
        own: The graph's; False where nothing is to keep its runs, not even that of the graph around.
        chosen: What `configurable` found for the run.
    """
    found = own if own is False else chosen.get(_OUTER_SAVER, own)
    return found if isinstance(found, BaseCheckpointSaver) else None


def durable(options: dict[str, Any], own: Checkpointer, chosen: dict[str, Any]) -> dict[str, Any]:
    """The options of a run, with each step written before the next one begins, unless the caller or one around chose otherwise.

    LangGraph's default writes it while the next step runs already: comments finished before that would be lost with the process.
    """
    decided = options.get("durability") is not None or "checkpoint_during" in options or _OUTER_DURABILITY in chosen
    # Without a checkpointer LangGraph would wait for a write that never began.
    return options if decided or saver_that_counts(own, chosen) is None else {**options, "durability": "sync"}


def check_command(command: Command[Any]) -> None:
    """Refuse a command that does more than to go on with a run: what it writes into the state would pass the door unchecked.

    Raises:
        InputError: It updates the state, or jumps to a node.
        ThreadError: It is empty.
    """
    if command.update or command.goto or command.graph:
        raise InputError(
            "A command can only go on with a run here: Command(resume=[...]), without update, goto or graph. To ask for something else, ask a new question."
        )
    if command.resume is None:
        raise ThreadError("The command to go on is empty. Give the list of values to hear: Command(resume=[...]).")


def check_thread(data: Any, saver: Checkpointer, bound: RunnableConfig | None, config: RunnableConfig | None, *, reviews: bool) -> None:
    """Refuse a run that could not be kept, or gone on with, for want of a checkpointer or a thread.

    Inside another graph both are that graph's, unless a thread is named.

    Args:
        data: The input; None and commands go on with a run.
        saver: The graph's own.
        bound: The graph's own configuration.
        config: The caller's, or the run around's.
        reviews: Whether the graph stops for a person.

    Raises:
        ThreadError: Says what is missing.
    """
    chosen = configurable(bound, config)
    if _TASK in _flat(config) and _TASK not in chosen:
        _check_bound(saver, reviews=reviews)
    if any(key.startswith(_INSIDE) for key in chosen) and saver is not False:
        if reviews and not chosen.get(_OUTER_SAVER, True):
            raise ThreadError(f"{_STOPS} The graph around it has none, and its own does not count there: compile that graph with a checkpointer.")
        return
    if saver is True:
        raise ThreadError(
            "checkpointer=True takes the checkpointer and the thread of a graph around this one, and there is none, or the run names a thread "
            "of its own. Give create_graph a checkpointer of its own, or leave the thread out."
        )
    if not saver and (data is None or isinstance(data, Command)):
        raise ThreadError(
            "This graph has no checkpointer, so there is no run to go on with. "
            "Give create_graph(checkpointer=...) the one that kept the run, or ask a question."
        )
    if not saver and reviews:
        raise ThreadError(f"{_STOPS} Give create_graph a checkpointer too, such as langgraph.checkpoint.memory.InMemorySaver().")
    # Savers take None for a name like any other: all whose thread is missing would share one conversation.
    if saver and chosen.get("thread_id") in (None, ""):
        raise ThreadError(
            'This graph has a checkpointer, so its runs need a thread to be kept in. Give it beside the input: {"configurable": {"thread_id": "1"}}.'
        )


def _check_bound(saver: Checkpointer, *, reviews: bool) -> None:
    """Refuse a thread that is bound to a graph inside another one, where nothing could keep it or the graph around would not stop with it."""
    if not isinstance(saver, BaseCheckpointSaver):
        raise ThreadError(
            "A thread is bound to this graph, which has no checkpointer of its own to keep it in. Give create_graph one, "
            "or leave the thread out: inside another graph its runs are kept with those of that graph."
        )
    if reviews:
        raise ThreadError(
            "This graph stops for review on a thread that is bound to it, and the graph around it would not stop too. "
            "Leave the thread out, so that both stop; or invoke this one in a node, with the thread, and look for __interrupt__ in what it returns."
        )


@contextmanager
def told_plainly(saver: Checkpointer, *, is_async: bool) -> Iterator[None]:
    """Context in which LangGraph's refusals to go on with a run, or to use a checkpointer in this way, become errors of ours.

    Raises:
        ThreadError: In their place.
    """
    try:
        yield
    except Exception as error:
        found = getattr(error, "original", error)
        if isinstance(found, EmptyInputError):
            raise ThreadError(
                "There is nothing to go on with: the thread holds no run that stopped, or nothing was given to resume it with. "
                "Check the thread_id, or ask a question."
            ) from error
        if isinstance(found, NotImplementedError | asyncio.InvalidStateError) and _raised_in(found) in {
            cls.__module__ for cls in type(saver).__mro__
        }:
            ways = ("awaited", "invoke and stream", "an async one") if is_async else ("called without await", "ainvoke and astream", "a sync one")
            raise ThreadError(
                f"The checkpointer {type(saver).__name__} cannot be {ways[0]}. Use {ways[1]}, or give create_graph {ways[2]} "
                "(SqliteSaver and AsyncSqliteSaver are such a pair)."
            ) from error
        raise


def _raised_in(error: BaseException) -> str:
    """The module whose code raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""
