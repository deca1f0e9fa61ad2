"""A host application with `prompts` and `nodes` packages of its own, and the plural graph as one node of its graph.

python examples/host_app/main.py
"""

from __future__ import annotations

from typing import Any

from langgraph.graph import END, START, StateGraph
from typing_extensions import TypedDict

import nodes
import prompts
import vispa_graph
from vispa_graph import create_graph


class HostState(TypedDict, total=False):
    """The host's keys, and those that it shares with the plural graph."""

    message: str
    reply: str
    query: str
    mode: str
    response: str
    values: list[dict[str, Any]]


def main() -> None:
    plural = create_graph()
    builder = StateGraph(HostState)
    builder.add_node("triage", nodes.triage)
    builder.add_node("plural", plural)
    builder.add_node("reply", nodes.reply)
    builder.add_edge(START, "triage")
    builder.add_edge("triage", "plural")
    builder.add_edge("plural", "reply")
    builder.add_edge("reply", END)
    host = builder.compile(name="host")

    print(f"prompts from {prompts.__file__}")
    print(f"nodes from {nodes.__file__}")
    print(f"vispa_graph from {vispa_graph.__file__}")
    given: HostState = {"message": " My sister wants to stop her chemotherapy. Should we try to change her mind? "}
    final: dict[str, Any] = {}
    # subgraphs=True also shows the steps inside the plural graph.
    for path, kind, part in host.stream(given, stream_mode=["updates", "values"], subgraphs=True):
        if kind == "updates":
            inside = "  inside plural: " if path else "host: "
            print(inside + ", ".join(part))
        elif not path:
            final = part
    print(f"\n{final['reply']}")
    plural.close()


if __name__ == "__main__":
    main()
