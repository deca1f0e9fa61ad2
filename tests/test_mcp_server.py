"""The MCP server, driven by the official client over stdio and HTTP."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import httpx2
import pytest
from collector import Collector
from mcp import MCPError
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from vispa_graph import mcp_server
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.mcp_server import LARGEST_REQUEST, LONGEST_QUERY, create_server, serve_http
from vispa_graph.resources import Resources
from vispa_graph.settings import Settings
from vispa_graph.state import Output

QUERY = "Should my father, 84, have an operation he does not want?"
PRIVATE = "Okafor"
TOKEN = "a token"
TESTS = Path(__file__).parent


class Breaking(FakeEngine):
    """Breaks on a word, with that word in the message."""

    def generate(self, request):
        if PRIVATE in str(request.messages):
            raise RuntimeError(f"cannot bear {PRIVATE}")
        return super().generate(request)


@pytest.fixture(scope="module")
def url(cache, taxonomy, word_encoder):
    """A server over HTTP in a thread of its own."""
    resources = Resources(Settings(), engine=Breaking(), encoder=word_encoder, taxonomy=taxonomy)
    found = queue.Queue()
    threading.Thread(target=serve_http, args=(create_server(resources), 0, TOKEN, found.put), daemon=True).start()
    return found.get(timeout=60)


@pytest.fixture(params=[pytest.param("stdio", marks=pytest.mark.slow), "http"])
def connect(request):
    """Opens a client on either transport."""
    if request.param == "http":
        url = request.getfixturevalue("url")
        return lambda: Client(streamable_http_client(url, http_client=httpx2.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)))
    return lambda: Client(StdioServerParameters(command=sys.executable, args=[str(TESTS / "mcp_over_stdio.py"), "mcp"], env=environment()))


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}


def text(result):
    return "".join(block.text for block in result.content)


def drive(connect, use):
    async def run():
        async with connect() as client:
            return await use(client)

    return anyio.run(run)


def test_a_client_asks_follows_up_explains_and_is_told_of_progress(connect):
    async def use(client):
        steps = []

        async def seen(done, total, message):
            steps.append((done, total, message))

        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        first = await client.call_tool("ask", {"query": QUERY, "options": ["Yes", "No"], "values": ["karma", "honor"]}, progress_callback=seen)
        run = first.structured_content["run"]
        second = await client.call_tool("ask", {"query": "And if he were 50?", "values": ["fairness"], "run": run})
        return tools, steps, first, second, await client.call_tool("explain_run", {"run": run})

    tools, steps, first, second, explained = drive(connect, use)
    assert set(tools) == {"ask", "list_values", "explain_run"}
    assert all(described.get("description") for tool in tools.values() for described in tool.input_schema["properties"].values())
    assert [result.is_error for result in (first, second, explained)] == [False] * 3
    out = first.structured_content
    assert set(out) == {"run", *Output.__annotations__}
    assert sum(out["distribution"].values()) == pytest.approx(1)
    assert out["response"] in text(first)
    assert out["run"] in text(first)
    assert [done for done, _, _ in steps] == [0, 1, 2, 3, 4]
    assert {total for _, total, _ in steps[1:]} == {4}
    assert {message for _, _, message in steps} == {"selecting values", "values selected", "comment from karma", "comment from honor", "answered"}
    assert second.structured_content["run"] == out["run"]
    assert second.structured_content["notes"][0].startswith("Read together with the earlier question")
    assert explained.structured_content["turns"] == [QUERY, "And if he were 50?"]
    assert "Fairness (score 1.00, weight 1): named by the caller" in text(explained)
    assert "probability of the value 0.500 before and 0.9" in text(explained)


def test_a_client_lists_all_values_or_those_at_stake(connect):
    async def use(client):
        return await client.call_tool("list_values", {}), await client.call_tool("list_values", {"query": QUERY})

    every, at_stake = drive(connect, use)
    assert len(every.structured_content["values"]) == 31
    assert "karma (" in text(every)
    assert len(at_stake.structured_content["values"]) == Settings().top_k
    assert all(value["reason"] for value in at_stake.structured_content["values"])


REFUSED = [
    ("ask", {}, "query"),
    ("ask", {"query": ""}, "query"),
    ("ask", {"query": "x" * (LONGEST_QUERY + 1)}, "at most"),
    ("ask", {"query": QUERY, "mode": "majority"}, "mode"),
    ("ask", {"query": QUERY, "mode": "distributional"}, "needs answer options"),
    ("ask", {"query": QUERY, "values": ["no such value"]}, "not in the taxonomy"),
    ("ask", {"query": QUERY, "run": "no such run"}, "There is no such run"),
    ("explain_run", {"run": "no such run"}, "There is no such run"),
    ("list_values", {"query": " "}, "The query is empty"),
    ("no_such_tool", {}, "Unknown tool"),
]


def test_bad_arguments_are_refused_with_a_readable_message_and_the_server_lives_on(connect):
    async def use(client):
        results = [await client.call_tool(name, arguments) for name, arguments, _ in REFUSED]
        return results, await client.call_tool("ask", {"query": QUERY, "values": ["karma"]})

    results, last = drive(connect, use)
    for result, (_, _, problem) in zip(results, REFUSED, strict=True):
        assert result.is_error
        assert problem in text(result)
    assert not last.is_error


@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        ("ask", {"query": QUERY, "valuess": ["karma"]}, "Unknown argument valuess, did you mean values? Known are query, mode"),
        ("explain_run", {"run": "1", "runs": "1"}, "Unknown argument runs, did you mean run? Known are run."),
        ("list_values", {f"my patient {PRIVATE}": "x"}, "There are arguments that are not known. Known are query."),
    ],
)
def test_an_argument_that_a_tool_does_not_have_is_refused_and_repeated_only_where_it_is_nearly_known(fake_resources, tool, arguments, told):
    async def run():
        async with Client(create_server(fake_resources)) as client:
            return await client.call_tool(tool, arguments)

    result = anyio.run(run)
    assert result.is_error
    assert told in text(result)
    assert PRIVATE not in text(result)


def test_the_schema_of_every_tool_allows_no_other_arguments(fake_resources):
    async def run():
        async with Client(create_server(fake_resources)) as client:
            return (await client.list_tools()).tools

    assert [tool.input_schema["additionalProperties"] for tool in anyio.run(run)] == [False] * 3


def test_an_unforeseen_failure_shows_its_kind_but_no_text_to_client_or_log(url, caplog):
    caplog.set_level(logging.DEBUG)

    async def run():
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with Client(streamable_http_client(url, http_client=httpx2.AsyncClient(headers=headers, timeout=60))) as client:
            return await client.call_tool("ask", {"query": f"May {PRIVATE} go home?", "values": ["karma"]})

    result = anyio.run(run)
    assert result.is_error
    assert "RuntimeError" in text(result)
    assert PRIVATE not in text(result)
    ours = [record for record in caplog.records if not record.name.startswith(("mcp.client", "httpx2", "httpcore2"))]
    assert not any(PRIVATE in record.getMessage() for record in ours if record.levelno >= logging.WARNING)


# HTTP


def post(url, body, **headers):
    given = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    return httpx2.post(url, content=body, headers={name: value for name, value in {**given, **headers}.items() if value}, timeout=30)


PING = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping"}).encode()


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", "Bearer a tokenn", "Basic a token", "a token"])
def test_without_the_right_token_nothing_is_answered(url, given):
    answer = post(url, PING, Authorization=given)
    assert answer.status_code == 401
    assert TOKEN not in answer.text
    assert httpx2.get(url).status_code == 401


def test_the_client_library_cannot_connect_with_a_wrong_token(url):
    async def run():
        async with Client(streamable_http_client(url, http_client=httpx2.AsyncClient(headers={"Authorization": "Bearer wrong"}))) as client:
            await client.list_tools()

    with pytest.raises(ExceptionGroup) as raised:
        anyio.run(run)
    assert raised.group_contains(MCPError, match="error response")


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b" " * (LARGEST_REQUEST + 1), {}, 413),
        (b"{not json", {}, 400),
        (b"[]", {}, 400),
        (b'{"jsonrpc": "2.0"}', {}, 400),
        (b"\xff\xfe\x00", {}, 400),
        (PING, {"Content-Type": "text/plain"}, 400),
        (PING, {"Host": "elsewhere.example"}, 421),
        (PING, {"Origin": "http://elsewhere.example"}, 403),
    ],
    ids=["oversized", "no json", "a list", "no method", "no text", "content type", "host", "origin"],
)
def test_oversized_malformed_and_foreign_requests_are_refused_without_dying(url, body, headers, status):
    assert post(url, body, **headers).status_code == status
    assert post(url, PING, Authorization="").status_code == 401


def test_it_listens_on_the_loopback_interface_alone(url):
    assert url.startswith("http://127.0.0.1:")


# Standard input and output

GREETING = (
    {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "0"}},
    },
    {"jsonrpc": "2.0", "method": "notifications/initialized"},
)


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_only_protocol_goes_to_stdout_whatever_comes_in_or_is_printed(unbuffered):
    lines = [
        b"not json",
        b"\xff\xfe",
        b"[]",
        *(json.dumps(message).encode() for message in GREETING),
        json.dumps(call(2, "x" * 5_000_000)).encode(),
        b'{"jsonrpc": "2.0", "id": 3, "method": "no/such"}',
        json.dumps(call(4, QUERY)).encode(),
    ]
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "mcp_over_stdio.py"), "mcp"],
        env=environment() | {"PYTHONUNBUFFERED": unbuffered},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    stray = []
    threading.Thread(target=lambda: stray.extend(process.stderr), daemon=True).start()
    process.stdin.write(b"\n".join(lines) + b"\n")
    process.stdin.flush()
    answered = {}
    while 4 not in answered:
        message = json.loads(process.stdout.readline())
        assert message["jsonrpc"] == "2.0"
        answered[message.get("id")] = message
    process.stdin.close()
    rest = process.stdout.read()
    assert process.wait(60) == 0
    assert rest == b""
    assert answered[2]["result"]["isError"]
    assert "error" in answered[3]
    assert not answered[4]["result"]["isError"]
    assert any(b"a stray print" in line for line in stray)
    assert not any(QUERY.encode() in line for line in stray)


def call(number, query):
    return {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": {"name": "ask", "arguments": {"query": query, "values": ["karma"]}}}


# Traces


@pytest.mark.slow
@pytest.mark.parametrize("way", ["stdin ends", "terminated", "interrupted"])
def test_what_was_traced_is_sent_before_the_server_ends(cache, way):
    with Collector() as collector:
        tracing = {"LANGSMITH_TRACING": "true", "LANGSMITH_API_KEY": "test", "LANGSMITH_ENDPOINT": collector.url, "VISPA_MCP_TOKEN": TOKEN}
        command = [sys.executable, str(TESTS / "mcp_over_stdio.py"), "mcp", *([] if way == "stdin ends" else ["--http", "0"])]
        process = subprocess.Popen(
            command, env=environment() | tracing, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if way == "stdin ends":
            for message in (*GREETING, call(2, QUERY)):
                process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            while '"id":2' not in process.stdout.readline():
                pass
            process.stdin.close()
        else:
            url = process.stderr.readline().split()[-1]

            async def ask():
                headers = {"Authorization": f"Bearer {TOKEN}"}
                async with Client(streamable_http_client(url, http_client=httpx2.AsyncClient(headers=headers, timeout=60))) as client:
                    assert not (await client.call_tool("ask", {"query": QUERY, "values": ["karma"]})).is_error

            anyio.run(ask)
            process.send_signal(signal.SIGTERM if way == "terminated" else signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) == {"stdin ends": 0, "terminated": 143, "interrupted": 130}[way]
        sent = {run["name"]: run for run in collector.runs.values()}
        assert set(sent) == {"vispa", "retrieve", "rerank", "steer", "steer karma", "overton", "compose"}
        assert all(run.get("end_time") for run in sent.values())
        assert QUERY.encode() not in collector.bytes


# Progress


@pytest.mark.parametrize(
    ("given", "comments"),
    [({"options": ["Yes", "No"]}, 0), ({"options": ["Yes", "No"], "attribute": "karma"}, 2), ({}, 2)],
    ids=["distributional", "steerable", "overton"],
)
@pytest.mark.parametrize("distribution", ["comments", "direct", "decoding"])
def test_progress_counts_the_steps_that_a_run_has_and_ends_with_the_last(make_resources, given, comments, distribution):
    if distribution == "comments":
        comments = 2
    steps = []

    async def seen(done, total, message):
        steps.append((done, total))

    async def run():
        async with Client(create_server(make_resources(distribution=distribution))) as client:
            await client.call_tool("ask", {"query": QUERY, "values": ["karma", "honor"], **given}, progress_callback=seen)

    anyio.run(run)
    assert steps == [(0, None), *((done, comments + 2) for done in range(1, comments + 3))]


# Memory


def test_only_the_last_runs_are_kept(monkeypatch, fake_resources):
    monkeypatch.setattr(mcp_server, "RUNS_KEPT", 2)

    async def run():
        async with Client(create_server(fake_resources)) as client:
            runs = []
            for _ in range(3):
                result = await client.call_tool("ask", {"query": QUERY, "values": ["karma"]})
                runs.append(result.structured_content["run"])
            return [(await client.call_tool("explain_run", {"run": run})).is_error for run in runs]

    assert anyio.run(run) == [True, False, False]


def test_runs_that_were_never_answered_push_out_none_that_was(monkeypatch, make_resources):
    monkeypatch.setattr(mcp_server, "RUNS_KEPT", 2)
    bad = ({"query": QUERY, "values": ["no such value"]}, {"query": f"May {PRIVATE} go home?", "values": ["honor"]}) * 2

    async def run():
        async with Client(create_server(make_resources(engine=Breaking()))) as client:
            run = (await client.call_tool("ask", {"query": QUERY, "values": ["karma"]})).structured_content["run"]
            refused = [await client.call_tool("ask", arguments) for arguments in bad]
            return refused, await client.call_tool("explain_run", {"run": run})

    refused, explained = anyio.run(run)
    assert all(result.is_error for result in refused)
    assert explained.structured_content["turns"] == [QUERY]


def test_a_run_that_cannot_be_explained_shows_the_kind_of_failure_but_no_text(monkeypatch, fake_resources):
    def fails(state):
        raise KeyError(PRIVATE)

    monkeypatch.setattr(mcp_server, "explain", fails)

    async def run():
        async with Client(create_server(fake_resources)) as client:
            run = (await client.call_tool("ask", {"query": QUERY, "values": ["karma"]})).structured_content["run"]
            return await client.call_tool("explain_run", {"run": run})

    result = anyio.run(run)
    assert result.is_error
    assert "KeyError" in text(result)
    assert PRIVATE not in text(result)


def test_after_a_follow_up_that_failed_the_turn_before_it_is_explained(make_resources):
    async def run():
        async with Client(create_server(make_resources(engine=Breaking()))) as client:
            run = (await client.call_tool("ask", {"query": QUERY, "values": ["karma"]})).structured_content["run"]
            failed = await client.call_tool("ask", {"query": f"May {PRIVATE} go home?", "values": ["honor"], "mode": "overton", "run": run})
            return failed, await client.call_tool("explain_run", {"run": run})

    failed, explained = anyio.run(run)
    assert failed.is_error
    assert explained.structured_content["turns"] == [QUERY]
    assert [value["id"] for value in explained.structured_content["values"]] == ["karma"]


def test_arguments_that_do_not_fit_are_not_repeated(fake_resources):
    async def run():
        async with Client(create_server(fake_resources)) as client:
            bad = ({"query": [PRIVATE]}, {"query": QUERY, "mode": PRIVATE}, {"query": QUERY, "values": {PRIVATE: 1}})
            return [await client.call_tool("ask", arguments) for arguments in bad]

    for result in anyio.run(run):
        assert result.is_error
        assert "do not fit" in text(result)
        assert PRIVATE not in text(result)
