"""Runs that `test_durability.py` starts in processes of their own, to kill them. No model: an engine that takes its time and keeps a log."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command
from typing_extensions import TypedDict

import vispa_graph.engine.directions
import vispa_graph.engine.layers
import vispa_graph.engine.store
from vispa_graph import as_tool
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.graph import create_graph
from vispa_graph.settings import Settings
from vispa_graph.taxonomy_index import Taxonomy

__all__ = ["GIVEN", "STRICT", "VALUES", "serve"]

STRICT = JsonPlusSerializer(allowed_msgpack_modules=None)
TAXONOMY = Taxonomy.load()
VALUES = list(TAXONOMY.ids[:8])
GIVEN = {"query": "Should my father, 84, have an operation he does not want?", "options": ["Yes", "No"], "values": VALUES}
_ = vispa_graph.engine  # imported before processes are forked, so that none of them waits for it


class SlowEngine(FakeEngine):
    """Makes one comment after the other, in random order, and writes the value of each into a log when it is done."""

    def __init__(self, log: Path, pause: float) -> None:
        super().__init__()
        self._log, self._pause = log, pause
        self._chance = random.Random(str(log) + str(os.getpid()))
        self._lock, self._waiting = threading.Condition(), []
        threading.Thread(target=self._work, daemon=True).start()

    def generate(self, request):
        future = Future()
        self._log.with_suffix(".begun").touch()
        with self._lock:
            self._waiting.append((request, future))
            self._lock.notify()
        return future

    def _work(self):
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._waiting)
                request, future = self._waiting.pop(self._chance.randrange(len(self._waiting)))
            time.sleep(self._pause)
            with self._log.open("a") as log:
                log.write(f"{request.steering.direction.value}\n")
            future.set_result(super().generate(request).result())


class NoWords:
    """Nothing is looked up: the values are named."""

    fingerprint = "none"


class Asked(TypedDict, total=False):
    """What a host knows; as a node ours shares it."""

    query: str
    options: list
    values: list
    response: str
    distribution: dict
    answer: dict


def hosted(inner, place, saver):
    """A graph around ours that has it as a node, or asks it in one, by a call or as a tool; ours itself where there is no such place."""
    if place is None:
        return inner
    tool = as_tool(inner)
    call = {"name": tool.name, "args": GIVEN, "id": "1", "type": "tool_call"}

    def ask(_):
        return {"answer": tool.invoke(call).artifact if place == "tool" else inner.invoke(GIVEN)}

    async def aask(_):
        return {"answer": (await tool.ainvoke(call)).artifact if place == "tool" else await inner.ainvoke(GIVEN)}

    node = inner if place == "node" else RunnableLambda(ask, aask)
    return StateGraph(Asked).add_node("ask", node).add_edge(START, "ask").compile(checkpointer=saver)


def serve(folder: str, thread: str, asynchronous: bool, resume: object, pause: float, review: bool = False, place: str | None = None) -> None:
    """Begin the run of a thread, or go on with it, and write its output where it ends."""
    home = Path(folder)
    given = GIVEN if resume is None else None if resume == "go on" else Command(resume=resume)
    config = {"configurable": {"thread_id": thread}}
    parts = {
        "engine": SlowEngine(home / f"{thread}.log", pause),
        "encoder": NoWords(),
        "taxonomy": TAXONOMY,
        "settings": Settings(method="mean_difference", cache=home / "cache"),
        "review": review,
    }
    if asynchronous:

        async def run():
            async with AsyncSqliteSaver.from_conn_string(str(home / "runs.sqlite")) as saver:
                saver.serde = STRICT
                return await hosted(create_graph(**parts, checkpointer=saver), place, saver).ainvoke(given, config)

        out = asyncio.run(run())
    else:
        connection = sqlite3.connect(home / "runs.sqlite", check_same_thread=False)
        saver = SqliteSaver(connection, serde=STRICT)
        out = hosted(create_graph(**parts, checkpointer=saver), place, saver).invoke(given, config)
        connection.close()
    written = home / f"{thread}.out"
    written.with_suffix(".part").write_bytes(STRICT.dumps_typed(out)[1])
    os.replace(written.with_suffix(".part"), written)
