"""A host application with `prompts` and `nodes` packages, tracing, a thread pool and an event loop of its own.

The plural graph is one node of its graph, asked from its threads and from its loop. The host's tracer sees our runs inside its own,
without the words in them.

    python examples/host_app/main.py
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from typing_extensions import TypedDict

import nodes
import prompts
import vispa_graph
from vispa_graph import PluralGraph, create_graph

MESSAGES = [
    " My sister wants to stop her chemotherapy. Should we try to change her mind? ",
    "May a nurse lie to a patient who asks how long he has?",
    "Should my father, 84, have an operation he does not want?",
]


class HostState(TypedDict, total=False):
    """The host's keys, and those that it shares with the plural graph."""

    message: str
    reply: str
    query: str
    mode: str
    response: str
    values: list[dict[str, Any]]


class HostTracer(BaseTracer):
    """The host's own tracing: keeps finished traces."""

    def __init__(self) -> None:
        super().__init__()
        self.traces: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.traces.append(run)


def host_graph(plural: PluralGraph) -> CompiledStateGraph[Any, Any, Any, Any]:
    builder = StateGraph(HostState)
    builder.add_node("triage", nodes.triage)
    builder.add_node("plural", plural)
    builder.add_node("reply", nodes.reply)
    builder.add_edge(START, "triage")
    builder.add_edge("triage", "plural")
    builder.add_edge("plural", "reply")
    builder.add_edge("reply", END)
    return builder.compile(name="host")


def all_runs(run: Run) -> list[Run]:
    return [run, *(found for child in run.child_runs for found in all_runs(child))]


def ours(trace: Run) -> list[Run]:
    """The runs of the plural graph inside one of the host's."""
    return [run for root in all_runs(trace) if root.name == "vispa" for run in all_runs(root)]


def streamed(host: CompiledStateGraph[Any, Any, Any, Any], message: str, tracer: HostTracer) -> str:
    """One reply; subgraphs=True also shows the steps inside the plural graph."""
    reply = ""
    for path, kind, part in host.stream({"message": message}, {"callbacks": [tracer]}, stream_mode=["updates", "values"], subgraphs=True):
        if kind == "updates":
            inside = "  inside plural: " if path else "host: "
            print(inside + ", ".join(part))
        elif not path:
            reply = part.get("reply", "")
    return reply


async def from_the_loop(host: CompiledStateGraph[Any, Any, Any, Any], tracer: HostTracer) -> list[str]:
    """All messages at once in the host's event loop."""
    answers = await asyncio.gather(*(host.ainvoke({"message": message}, {"callbacks": [tracer]}) for message in MESSAGES))
    return [answer["reply"] for answer in answers]


def from_threads(host: CompiledStateGraph[Any, Any, Any, Any], tracer: HostTracer) -> list[str]:
    """All messages at once in the host's threads."""
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="host") as pool:
        answers = list(pool.map(lambda message: host.invoke({"message": message}, {"callbacks": [tracer]}), MESSAGES))
    return [answer["reply"] for answer in answers]


def main() -> None:
    plural = create_graph()
    host, tracer = host_graph(plural), HostTracer()
    print(f"prompts from {prompts.__file__}")
    print(f"nodes from {nodes.__file__}")
    print(f"vispa_graph from {vispa_graph.__file__}")
    reply = streamed(host, MESSAGES[0], tracer)
    same = from_threads(host, tracer) == asyncio.run(from_the_loop(host, tracer))
    print(f"threads and event loop give the same replies: {same}")
    names = [sorted(run.name for run in ours(trace)) for trace in tracer.traces]
    told = repr([(run.inputs, run.outputs, run.error) for trace in tracer.traces for run in ours(trace)])
    print(
        f"{len(names)} traces of the host, each with one run of ours and all inside it: {all(n.count('vispa') == 1 and len(n) > 10 for n in names)}"
    )
    print(f"the messages are in our part of the host's traces: {any(message.strip() in told for message in MESSAGES)}")
    print(f"\n{reply}")
    plural.close()


if __name__ == "__main__":
    main()
