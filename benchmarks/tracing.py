"""What tracing costs: a run while the endpoint is out of reach, against one that is not traced; and how soon the command line ends.

    python -m benchmarks.tracing

Runs are interleaved, on the embedded models; medians of 15, and of 3 for the command line.
"""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from langchain_core.tracers.langchain import LangChainTracer
from langsmith import Client
from rich.console import Console
from rich.table import Table

from vispa_graph import create_graph

QUERY = {"query": "Should my father, 84, have an operation he does not want?"}
NOWHERE = "http://127.0.0.1:9"


def run_seconds(graph, client) -> float:
    config = {"callbacks": [LangChainTracer(client=client)]} if client else {}
    started = time.perf_counter()
    graph.invoke(QUERY, config)
    return time.perf_counter() - started


def exit_seconds(environment: dict[str, str]) -> float:
    """From the last byte of the answer to the end of the process."""
    command = [sys.executable, "-m", "vispa_graph", "ask", QUERY["query"], "--value", "karma", "--max-new-tokens", "5", "--json"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        answered = 0.0
        while os.read(process.stdout.fileno(), 65536):
            answered = answered or time.perf_counter()
        process.wait()
        return time.perf_counter() - answered


def main() -> None:
    logging.getLogger("langsmith").setLevel(logging.CRITICAL)  # it would tell of every batch that it could not send
    graph = create_graph()
    client = Client(api_url=NOWHERE, api_key="none")
    for traced in (None, client):
        run_seconds(graph, traced)
    pairs = [(run_seconds(graph, None), run_seconds(graph, client)) for _ in range(15)]
    plain, traced = (statistics.median(column) for column in zip(*pairs, strict=True))
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "VISPA_CACHE": cache, "PYTHONPATH": str(Path(__file__).parent.parent)}
        nowhere = environment | {"LANGSMITH_TRACING": "true", "LANGSMITH_ENDPOINT": NOWHERE, "LANGSMITH_API_KEY": "none"}
        nowhere_otel = nowhere | {"LANGSMITH_OTEL_ENABLED": "true", "LANGSMITH_OTEL_ONLY": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": NOWHERE}
        exit_seconds(environment)
        exits = [statistics.median(exit_seconds(e) for _ in range(3)) for e in (environment, nowhere, nowhere_otel)]
    table = Table(title=f"Tracing to an endpoint out of reach, {os.cpu_count()} cores")
    for column in ("what", "not traced", "LangSmith", "OpenTelemetry"):
        table.add_column(column)
    table.add_row("graph.invoke, s (ratio of the medians)", f"{plain:.3f}", f"{traced:.3f} ({traced / plain:.3f})", "")
    table.add_row("vispa ask: from its answer to its end, s", *(f"{seconds:.2f}" for seconds in exits))
    Console().print(table)
    os._exit(0)  # this process itself need not wait for its client


if __name__ == "__main__":
    main()
