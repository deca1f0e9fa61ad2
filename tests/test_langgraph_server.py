"""`langgraph.json`: what it names can be imported, and LangGraph's development server serves it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from langgraph_sdk import get_sync_client

from vispa_graph.plural_graph import PluralGraph

ROOT = Path(__file__).parent.parent
SERVED = json.loads((ROOT / "langgraph.json").read_text())["graphs"]
QUERY = "Should my father, 84, have an operation he does not want?"


@pytest.mark.parametrize(("name", "target"), SERVED.items())
def test_every_graph_of_langgraph_json_is_there_and_not_loaded_yet(name, target):
    module, _, variable = target.partition(":")
    graph = getattr(import_module(module), variable)
    assert isinstance(graph, PluralGraph)
    assert ("review" in graph.get_graph().nodes) == (name == "vispa_with_review")
    assert graph.checkpointer is None


@pytest.fixture
def server(cache, tmp_path):
    """The URL of `langgraph dev`, started in a folder of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    command = ["-m", "langgraph_cli", "dev", "--no-browser", "--no-reload", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VISPA_CACHE": str(cache), "LANGSMITH_TRACING": "false"}
    with log.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, *command, "--config", str(ROOT / "langgraph.json")], env=environment, cwd=tmp_path, stdout=written, stderr=written
        )
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            try:
                if httpx.get(f"{url}/ok", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.langgraph_server
@pytest.mark.skipif(not find_spec("langgraph_api"), reason="needs pip install 'langgraph-cli[inmem]' (Elastic License 2.0, for development only)")
def test_langgraph_dev_serves_the_graph_streams_and_waits_for_a_review(server):
    client = get_sync_client(url=server)
    given = {"query": QUERY, "values": ["karma", "honor"]}
    out = client.runs.wait(None, "vispa", input=given)
    assert [comment["value"] for comment in out["comments"]] == ["karma", "honor"]
    assert out["response"]
    thread = client.threads.create()["thread_id"]
    client.runs.wait(thread, "vispa_with_review", input=given)
    [stop] = client.threads.get_state(thread)["interrupts"]
    assert [value["id"] for value in stop["value"]["values"]] == ["karma", "honor"]
    events = list(client.runs.stream(thread, "vispa_with_review", command={"resume": ["karma"]}, stream_mode=["custom", "values"]))
    assert [event.data["value"] for event in events if event.event == "custom"] == ["karma"]
    assert events[-1].data["response"]
