"""Whether a run can be kept and gone on with, told before it begins. LangGraph's own words for it would be hidden like any other error's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import CONFIG_KEYS, ensure_config
from langgraph.errors import EmptyInputError
from langgraph.types import Checkpointer, Command

from vispa_graph.errors import ThreadError

# Keys that LangGraph gives the runs inside a run, one of them the checkpointer that counts there.
_INSIDE, _OUTER_SAVER = "__pregel_", "__pregel_checkpointer"
# A run that names one of these has a thread of its own, whatever run is around it.
_THREAD = frozenset({"thread_id", "checkpoint_ns", "checkpoint_id", "checkpoint_map"})
_STOPS = "This graph stops for review, and without a checkpointer nothing could go on from there."


def configurable(*configs: RunnableConfig | None) -> dict[str, Any]:
    """What configurations hold for a run: with those of the run around, unless they name a thread of their own."""
    own: dict[str, Any] = {}
    for config in configs:
        # As in LangChain, keys that no configuration has may stand beside the others.
        own |= {key: value for key, value in (config or {}).items() if key not in CONFIG_KEYS and value is not None}
        own |= (config or {}).get("configurable") or {}
    if any(own.get(key) is not None for key in _THREAD):
        return own
    return {**ensure_config().get("configurable", {}), **{key: value for key, value in own.items() if key not in _THREAD}}


def check_thread(data: Any, saver: Checkpointer, *configs: RunnableConfig | None, reviews: bool) -> None:
    """Refuse a run that could not be kept, or gone on with, for want of a checkpointer or a thread.

    Inside another graph both are that graph's, unless a thread is named.

    Args:
        data: The input; None and commands go on with a run.
        configs: The graph's own and the caller's.
        reviews: Whether the graph stops for a person.

    Raises:
        ThreadError: Says what is missing.
    """
    if isinstance(data, Command) and data.resume is None and not data.update and not data.goto:
        raise ThreadError("The command to go on is empty. Give the list of values to hear: Command(resume=[...]).")
    chosen = configurable(*configs)
    if any(key.startswith(_INSIDE) for key in chosen):
        if reviews and not chosen.get(_OUTER_SAVER, True):
            raise ThreadError(f"{_STOPS} The graph around it has none, and its own does not count there: compile that graph with a checkpointer.")
        return
    if saver is True:
        raise ThreadError("checkpointer=True takes the checkpointer of a graph around this one, and there is none. Give create_graph one of its own.")
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
