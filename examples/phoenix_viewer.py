"""A run in a real viewer on this machine: Arize Phoenix, through OpenInference, and read back from it.

    pip install "vispa-graph[openinference]"
    python -m venv phoenix && phoenix/bin/pip install arize-phoenix     # 900 MB, and its own versions of much: apart from ours
    python examples/phoenix_viewer.py phoenix/bin/phoenix               # add --stay to look at http://127.0.0.1:6006 afterwards

Phoenix is told to listen on this machine only (on another port with PHOENIX_PORT); by itself it would listen on all addresses. The texts are left out of what it gets, as
everywhere; `Settings(trace_content=True)` puts them in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from openinference.instrumentation.langchain import LangChainInstrumentor
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from vispa_graph import Settings, create_graph

URL = f"http://127.0.0.1:{os.environ.get('PHOENIX_PORT', '6006')}"  # Phoenix reads the variable too
PROJECT = "vispa"
QUESTION = "Should my father, 84, have an operation he does not want?"


def read(path: str) -> Any:
    with urlopen(URL + path, timeout=5) as answer:
        return json.load(answer)


def wait_for(path: str, seconds: int = 240) -> Any:
    """What Phoenix answers, once it does, and once there is something."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if found := read(path):
                return found
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise SystemExit(f"Phoenix did not answer within {seconds} seconds.")


def spans(number: int, seconds: int = 120) -> list[dict[str, Any]]:
    """The spans of the project, once there are as many."""
    until = time.monotonic() + seconds
    found: list[dict[str, Any]] = []
    while len(found) < number and time.monotonic() < until:
        found = wait_for(f"/v1/projects/{PROJECT}/spans?limit=100")["data"]
        time.sleep(1)
    return found


def show(found: list[dict[str, Any]], parent: str | None = None, depth: int = 0) -> None:
    for span in sorted((s for s in found if s["parent_id"] == parent), key=lambda s: s["start_time"]):
        tokens = span["attributes"].get("llm.token_count.completion")
        print(f"{'  ' * depth}{span['name']} ({span['span_kind']}){f', {tokens} tokens' if tokens else ''}")
        show(found, span["context"]["span_id"], depth + 1)


def main(program: str, stay: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PHOENIX_HOST": "127.0.0.1", "PHOENIX_WORKING_DIR": folder, "PHOENIX_TELEMETRY_ENABLED": "false"}
        environment.pop("PYTHONPATH", None)
        server = subprocess.Popen([program, "serve"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for("/v1/projects")
            # The retriever finds 200 phrases, more than the 128 attributes that a span holds by default.
            limits = SpanLimits(max_span_attributes=2000)
            provider = TracerProvider(resource=Resource({"openinference.project.name": PROJECT}), span_limits=limits)
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{URL}/v1/traces")))
            LangChainInstrumentor().instrument(tracer_provider=provider)
            graph = create_graph(Settings(top_k=3))
            graph.invoke({"query": QUESTION})
            graph.close()
            provider.force_flush()
            found = spans(12)
            show(found)
            print("The question is in what Phoenix holds:", QUESTION in json.dumps(found))
            if stay:
                input(f"Look at {URL}, then press Enter. ")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(sys.argv[1], "--stay" in sys.argv)
