"""What tracing costs where the endpoint is dead: a run of the graph, and how soon the command line ends after its answer.

    python -m benchmarks.tracing
    python -m benchmarks.tracing --quick     # to see that it works; its figures say little

Two dead endpoints: one refuses connections, one takes them and never answers. Runs are interleaved, on the embedded models, the sides taking
turns in going first: the medians and quartiles of 25 rounds' ratios, and medians of 5 for the command line.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from langchain_core.tracers.langchain import LangChainTracer
from langsmith import Client
from rich.console import Console
from rich.table import Table

from vispa_graph import create_graph

T = TypeVar("T")
QUERY = {"query": "Should my father, 84, have an operation he does not want?"}
REFUSES = "http://127.0.0.1:9"
ALLOWED = {"graph.invoke": 1.05, "vispa ask": 2.0}  # a ratio, and seconds


def run_seconds(graph, client: Client | None) -> float:
    config = {"callbacks": [LangChainTracer(client=client)]} if client else {}
    started = time.perf_counter()
    graph.invoke(QUERY, config)
    return time.perf_counter() - started


def exit_seconds(environment: dict[str, str]) -> float:
    """From the first byte of the answer to the end of the process."""
    command = [sys.executable, "-m", "vispa_graph", "ask", QUERY["query"], "--value", "karma", "--max-new-tokens", "5", "--json"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        answered = 0.0
        while os.read(process.stdout.fileno(), 65536):
            answered = answered or time.perf_counter()
        process.wait()
        return time.perf_counter() - answered


def medians(rows: Iterable[Iterable[float]]) -> list[float]:
    """Of each column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def measure_runs(endpoints: list[str], times: int) -> tuple[float, list[list[float]]]:
    """Median seconds of a run that is not traced; and for each endpoint, round by round, how many times as long one takes that is."""
    logging.getLogger("langsmith").setLevel(logging.CRITICAL)  # it would tell of every batch that it could not send
    graph = create_graph()
    clients = [None, *(Client(api_url=url, api_key="none") for url in endpoints)]
    for client in clients:
        run_seconds(graph, client)
    rounds = [in_turn(clients, number, lambda client: run_seconds(graph, client)) for number in range(times)]
    return statistics.median(seconds[0] for seconds in rounds), [
        [seconds[place] / seconds[0] for seconds in rounds] for place in range(1, len(clients))
    ]


def in_turn(sides: Sequence[T], number: int, measure: Callable[[T], float]) -> list[float]:
    """The measures of all sides, in their order, beginning with another one each round."""
    places = [(number + step) % len(sides) for step in range(len(sides))]
    measured = {place: measure(sides[place]) for place in places}
    return [measured[place] for place in range(len(sides))]


def told(ratios: list[float]) -> str:
    """The median of ratios with the quartiles, and whether it is allowed."""
    middle = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [middle] * 3
    return f"{middle:.3f} ({low:.3f} to {high:.3f}), {'met' if middle <= ALLOWED['graph.invoke'] else 'not met'}"


def measure_exits(endpoints: list[str], times: int) -> list[float]:
    """Seconds to the end: not traced, then with each endpoint over LangSmith's protocol and over OpenTelemetry."""
    with tempfile.TemporaryDirectory() as cache:
        plain = {**os.environ, "VISPA_CACHE": cache, "PYTHONPATH": str(Path(__file__).parent.parent)}
        environments = [plain]
        for url in endpoints:
            traced = plain | {"LANGSMITH_TRACING": "true", "LANGSMITH_ENDPOINT": url, "LANGSMITH_API_KEY": "none"}
            otel = {"LANGSMITH_OTEL_ENABLED": "true", "LANGSMITH_OTEL_ONLY": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": url}
            environments += [traced, traced | otel]
        exit_seconds(plain)  # fills the cache
        return medians([exit_seconds(environment) for environment in environments] for _ in range(times))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one measurement of each")
    quick = parser.parse_args().quick
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoints = [REFUSES, f"http://127.0.0.1:{silent.getsockname()[1]}"]
        plain, ratios = measure_runs(endpoints, 1 if quick else 25)
        exits = measure_exits(endpoints, 1 if quick else 5)
    table = Table(title=f"Tracing to a dead endpoint, {os.cpu_count()} cores")
    for column in ("what", "allowed", "not traced", "refuses", "never answers", "refuses, OTel", "never answers, OTel"):
        table.add_column(column)
    table.add_row("graph.invoke: seconds, and ratios to that", f"{ALLOWED['graph.invoke']:.2f}", f"{plain:.3f}", *map(told, ratios), "", "")
    order = [exits[number] for number in (0, 1, 3, 2, 4)]
    table.add_row("vispa ask: from its answer to its end, s", f"{ALLOWED['vispa ask']:.2f}", *(f"{seconds:.2f}" for seconds in order))
    Console().print(table)
    os._exit(0)  # this process itself need not wait for its clients


if __name__ == "__main__":
    main()
