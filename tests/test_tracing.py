"""A run seen in a viewer: the same tree by every way of running, with what explains it; and as a local file."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from collector import Collector
from langchain.agents import create_agent
from langchain_core.language_models import FakeListChatModel
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.tracers.langchain import LangChainTracer
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command
from langsmith import Client
from typing_extensions import TypedDict

from vispa_graph import as_tool, cli
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.errors import NonFiniteError, TraceError
from vispa_graph.graph import create_graph
from vispa_graph.tracing import TracedRun, _documents, describe, draw, read_trace

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
QUERY = "Should my father, 84, have an operation he does not want?"
TWO = ["karma", "honor"]
INPUTS = {
    "overton": {"query": QUERY},
    "steerable": {"query": QUERY, "attribute": "a nurse"},
    "distributional": {"query": QUERY, "options": ["Yes", "No"]},
}


@pytest.fixture
def make_graph(make_resources):
    return lambda **settings: create_graph(resources=make_resources(**({"top_k": 2} | settings)))


def traced(graph, data, **config):
    """The run as a local trace."""
    tracer = RunCollectorCallbackHandler()
    graph.invoke(data, {"callbacks": [tracer], **config})
    return TracedRun.of(tracer.traced_runs[-1])


def runs(run):
    return [run, *(found for child in run.children for found in runs(child))]


def drawn(run, depth=0):
    """The tree as text, without durations; steps that ran at the same time stand in the order of their values."""
    at_once = iter(sorted((child for child in run.children if child.name == "steer"), key=lambda child: child.children[0].name))
    ordered = [next(at_once) if child.name == "steer" else child for child in run.children]
    lines = [describe(run, timed=False), *(f"  - {document}" for document in _documents(run))]
    return "\n".join(["  " * depth + line for line in lines] + [drawn(child, depth + 1) for child in ordered])


# What the tree tells


@pytest.mark.parametrize("aggregation", ["generate", "compose"])
@pytest.mark.parametrize("mode", list(INPUTS))
def test_the_trace_of_every_mode_is_the_stored_one(make_graph, mode, aggregation):
    text = drawn(traced(make_graph(aggregation=aggregation), INPUTS[mode])) + "\n"
    assert text == (DATA / "traces" / f"{mode}_{aggregation}.txt").read_text(encoding="utf-8")


def test_a_retriever_run_holds_the_documents_with_scores_and_another_what_moved_and_why(make_graph):
    found, reranked = (run for run in runs(traced(make_graph(), INPUTS["overton"])) if run.run_type == "retriever")
    scores = [document["metadata"]["score"] for document in found.outputs["documents"]]
    assert scores == sorted(scores, reverse=True)
    assert all(document["page_content"] != "redacted" for document in found.outputs["documents"])
    moved = [document["metadata"] for document in reranked.outputs["documents"]]
    assert [entry["rank"] for entry in moved] == [1, 2]
    assert all(entry["retrieved"] >= 1 and entry["reason"].startswith(("like", "about", "as in", "is about")) for entry in moved)


def test_an_llm_run_of_a_value_holds_its_facts_and_its_numbers(make_graph):
    run = next(run for run in runs(traced(make_graph(seed=7, target_probability=0.8), INPUTS["overton"])) if run.name.startswith("steer "))
    facts = run.metadata
    assert run.run_type == "llm"
    assert run.name == f"steer {facts['value']}"
    assert (facts["ls_provider"], facts["ls_model_name"], facts["mode"], facts["method"]) == ("vispa", "fake", "overton", "probe")
    assert (facts["target_probability"], facts["seed"], facts["layers"]) == (0.8, 7, [2, 3, 4, 5, 6])
    assert facts["family"]
    assert {"mode:overton", "method:probe"} <= set(run.tags)
    message = run.outputs["generations"][0][0]["message"]["kwargs"]
    told = message["response_metadata"]
    assert message["usage_metadata"]["output_tokens"] > 0
    assert told["steering"]["before"] == [0.5] * 5
    assert told["steering"]["after"] == [0.8] * 5
    assert told["steering"]["displacement"] == 0.1
    assert (told["batch_rows"], told["batch_width"], told["dtype"]) == (1, message["usage_metadata"]["input_tokens"], "float32")
    assert told["first_token_seconds"] >= 0


def test_tags_of_the_whole_run_say_mode_and_method(make_graph):
    assert {"mode:steerable", "method:pca"} <= set(traced(make_graph(method="pca"), INPUTS["steerable"]).tags)
    assert "method:unsteered" in traced(make_graph(strength=0), INPUTS["overton"]).tags


def test_tags_of_a_run_that_goes_on_say_the_method_and_its_comments_the_mode_too(make_resources):
    graph = create_graph(resources=make_resources(top_k=2), review=True, checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": "1"}}
    graph.invoke(INPUTS["overton"], thread)
    resumed = traced(graph, Command(resume=TWO), **thread)
    assert "method:probe" in resumed.tags
    assert all({"mode:overton", "method:probe"} <= set(run.tags) for run in runs(resumed) if run.name.startswith("steer "))


def test_a_composed_answer_is_a_chain_run_with_its_attribution(make_graph):
    tree = traced(make_graph(aggregation="compose", trace_content=True), INPUTS["overton"])
    compose = next(run for run in runs(tree) if run.name == "compose")
    assert compose.run_type == "chain"
    assert compose.outputs["output"] == tree.outputs["attribution"]


def test_scores_of_options_are_llm_runs_with_their_probabilities(make_graph):
    tree = traced(make_graph(), INPUTS["distributional"])
    scored = [run for run in runs(tree) if run.name == "score options"]
    assert [run.metadata["value"] for run in scored] == [comment["value"] for comment in tree.outputs["comments"]]
    messages = [run.outputs["generations"][0][0]["message"]["kwargs"] for run in scored]
    assert all(message["usage_metadata"]["input_tokens"] > 0 for message in messages)
    rows = [message["response_metadata"]["probabilities"] for message in messages]
    mean = [sum(column) / 2 for column in zip(*rows, strict=True)]
    assert mean == pytest.approx(list(tree.outputs["distribution"].values()))


def test_a_score_that_fails_ends_its_run_with_the_error(make_resources):
    class Deaf(FakeEngine):
        def score(self, request):
            return super(Deaf, Deaf(fail=NonFiniteError("NaN"))).generate(request)

    tracer = RunCollectorCallbackHandler()
    with pytest.raises(NonFiniteError):
        create_graph(resources=make_resources(engine=Deaf(), top_k=2)).invoke(INPUTS["distributional"], {"callbacks": [tracer]})
    failed = [run for run in runs(TracedRun.of(tracer.traced_runs[-1])) if run.name == "score options"]
    assert len(failed) == 2
    assert all("NonFiniteError" in run.error and run.end for run in failed)


# However it is run

EXPECTED = [
    ("retrieve", "chain", [("TaxonomyRetriever", "retriever", [])]),
    ("rerank", "chain", [("ValueReranker", "retriever", [])]),
    ("steer", "chain", [("steer harmlessness", "llm", [])]),
    ("steer", "chain", [("steer self-direction", "llm", [])]),
    ("overton", "chain", [("summarise", "llm", [])]),
]


def by_name(tree):
    """Steps that ran at the same time in the order of their names."""
    return sorted(((name, kind, by_name(inside)) for name, kind, inside in tree), key=str)


async def drain(parts):
    return [part async for part in parts]


WAYS = {
    "invoke": lambda graph, config: graph.invoke(INPUTS["overton"], config),
    "ainvoke": lambda graph, config: asyncio.run(graph.ainvoke(INPUTS["overton"], config)),
    "stream": lambda graph, config: list(graph.stream(INPUTS["overton"], config, stream_mode=["updates", "messages", "custom"])),
    "astream": lambda graph, config: asyncio.run(drain(graph.astream(INPUTS["overton"], config, stream_mode="messages"))),
    "events": lambda graph, config: asyncio.run(drain(graph.astream_events(INPUTS["overton"], config))),
    "batch": lambda graph, config: graph.batch([INPUTS["overton"]], config),
    "with_config": lambda graph, config: graph.with_config(config).invoke(INPUTS["overton"]),
}


@pytest.fixture
def collector():
    with Collector() as found:
        yield found


@pytest.fixture
def client(collector):
    client = Client(api_url=collector.url, api_key="test")
    yield client
    client.cleanup()


def ended(collector, number):
    return lambda: sum(bool(run.get("end_time")) for run in collector.runs.values()) >= number


@pytest.mark.parametrize("way", list(WAYS))
def test_the_tree_is_the_same_sync_async_and_streamed(make_graph, collector, client, way):
    WAYS[way](make_graph(), {"callbacks": [LangChainTracer(client=client)]})
    client.flush()
    collector.wait_for(ended(collector, 11))
    [(name, kind, inside)] = collector.tree()
    assert (name, kind) == ("vispa", "chain")
    assert by_name(inside) == by_name(EXPECTED)
    assert not any(run.get("error") for run in collector.runs.values())


@pytest.mark.parametrize(
    ("multipart", "zstd", "path", "encoding"),
    [(True, True, "/runs/multipart", "zstd"), (True, False, "/runs/multipart", None), (False, False, "/runs/batch", None)],
)
def test_langsmith_gets_the_tree_compressed_as_multipart_or_as_batch(make_graph, multipart, zstd, path, encoding):
    with Collector(multipart=multipart, zstd=zstd) as collector:
        client = Client(api_url=collector.url, api_key="test")
        make_graph().invoke(INPUTS["overton"], {"callbacks": [LangChainTracer(client=client)]})
        client.flush()
        collector.wait_for(ended(collector, 11))
        client.cleanup()
        assert set(collector.paths) == {path}
        assert encoding in collector.encodings
        assert by_name(collector.tree()[0][2]) == by_name(EXPECTED)
        steered = next(run for run in collector.runs.values() if run["name"] == "steer harmlessness")
        assert steered["extra"]["metadata"]["usage_metadata"]["output_tokens"] > 0
        found = next(run for run in collector.runs.values() if run["name"] == "TaxonomyRetriever")
        assert found["outputs"]["documents"][0]["metadata"]["score"] > 0


def test_opentelemetry_gets_the_tree_as_spans(make_graph, collector):
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=f"{collector.url}/v1/traces")))
    client = Client(api_url=collector.url, api_key="test", tracing_mode="otel", otel_tracer_provider=provider)
    make_graph().invoke(INPUTS["overton"], {"callbacks": [LangChainTracer(client=client)]})
    client.flush()
    collector.wait_for(lambda: len(collector.spans) >= 11)
    client.cleanup()
    assert set(collector.paths) == {"/v1/traces"}
    spans = {span.span_id: span for span in collector.spans}

    def path(span):
        return [*(path(spans[span.parent_span_id]) if span.parent_span_id in spans else []), span.name]

    paths = {" > ".join(path(span)) for span in collector.spans}
    assert {"vispa > steer > steer harmlessness", "vispa > rerank > ValueReranker", "vispa > overton > summarise"} <= paths
    attributes = {a.key: a.value for a in next(s for s in collector.spans if s.name == "steer harmlessness").attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value > 0
    assert attributes["langsmith.metadata.value"].string_value == "harmlessness"


class Scripted(GenericFakeChatModel):
    def bind_tools(self, tools, **kwargs):
        return self


@pytest.mark.parametrize("is_async", [False, True])
def test_inside_an_agent_our_graph_nests_under_the_tool(make_graph, collector, client, is_async):
    call = AIMessage("", tool_calls=[{"name": "plural_answer", "args": INPUTS["overton"], "id": "1"}])
    agent = create_agent(Scripted(messages=iter([call, AIMessage("Done.")])), tools=[as_tool(make_graph())])
    data, config = {"messages": [("user", QUERY)]}, {"callbacks": [LangChainTracer(client=client)]}
    _ = asyncio.run(agent.ainvoke(data, config)) if is_async else agent.invoke(data, config)
    client.flush()
    collector.wait_for(lambda: any(run.get("end_time") and not run.get("parent_run_id") for run in collector.runs.values()))
    [tool] = [run for run in collector.runs.values() if run["run_type"] == "tool"]
    [(name, _, inside)] = collector.tree(tool["id"])
    assert (tool["name"], name) == ("plural_answer", "vispa")
    assert by_name(inside) == by_name(EXPECTED)
    assert len({run["trace_id"] for run in collector.runs.values()}) == 1


class Shared(TypedDict, total=False):
    query: str
    response: str


def host_of(graph, through):
    """A host's graph whose node is ours, or calls ours with or without the configuration."""
    calls = {
        "node": graph,
        "call": lambda state: {"response": graph.invoke({"query": state["query"]})["response"]},
        "call with config": lambda state, config: {"response": graph.invoke({"query": state["query"]}, config)["response"]},
    }
    builder = StateGraph(Shared)
    builder.add_node("ours", calls[through])
    builder.add_edge(START, "ours")
    builder.add_edge("ours", END)
    return builder.compile(name="host")


@pytest.mark.parametrize("through", ["node", "call", "call with config"])
def test_inside_a_host_s_graph_it_nests_once_under_the_host_s_node(make_graph, collector, client, through):
    host_of(make_graph(), through).invoke({"query": QUERY}, {"callbacks": [LangChainTracer(client=client)]})
    client.flush()
    collector.wait_for(ended(collector, 13))
    [(_, _, [(node, _, [(name, _, inside)])])] = collector.tree()
    assert (node, name) == ("ours", "vispa")
    assert by_name(inside) == by_name(EXPECTED)


def test_runs_in_a_host_s_threads_keep_apart(make_graph, collector, client):
    graph = make_graph()

    def ask(number):
        return graph.invoke({"query": QUERY, "values": TWO}, {"callbacks": [LangChainTracer(client=client)], "run_name": f"case {number}"})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(8)))
    client.flush()
    collector.wait_for(ended(collector, 8 * 9))
    trees = {name: by_name(inside) for name, _, inside in collector.tree()}
    assert sorted(trees) == [f"case {number}" for number in range(8)]
    assert all(tree == trees["case 0"] for tree in trees.values())
    assert ("steer", "chain", [("steer karma", "llm", [])]) in trees["case 0"]


def test_the_main_model_s_runs_have_stable_names(make_resources):
    graph = create_graph(resources=make_resources(main_llm=FakeListChatModel(responses=["2", "As a nurse I would wait."]), top_k=2))
    names = [run.name for run in runs(traced(graph, INPUTS["steerable"])) if run.run_type == "llm" and not run.name.startswith("steer ")]
    assert names == ["choose", "answer"]


# An endpoint that is not there


def test_an_endpoint_that_cannot_be_reached_does_not_fail_the_run(make_graph):
    client = Client(api_url="http://127.0.0.1:9", api_key="test", timeout_ms=100)
    graph = make_graph()
    assert graph.invoke(INPUTS["overton"], {"callbacks": [LangChainTracer(client=client)]}) == graph.invoke(INPUTS["overton"])
    client.cleanup(timeout=0)


# The local file


@pytest.fixture
def file(make_graph, tmp_path):
    path = tmp_path / "trace.json"
    path.write_bytes(traced(make_graph(), INPUTS["overton"]).to_json())
    return path


def vispa(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], prog_name="vispa")


def test_a_trace_file_reads_back_as_it_was_written(make_graph, tmp_path):
    run = traced(make_graph(), INPUTS["distributional"])
    (tmp_path / "trace.json").write_bytes(run.to_json())
    assert read_trace(tmp_path / "trace.json") == run


def test_vispa_trace_prints_the_tree(file):
    result = vispa("trace", file)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("vispa (chain): method:probe, mode:overton")
    assert any(re.search(r"steer harmlessness \(llm\): .* tokens, layers 2 to 6, probability 0.500 > 0.900, moved by 10%", line) for line in lines)
    assert any(re.search(r"0\.\d\d self-direction, from place \d+ to \d+: ", line) for line in lines)
    assert lines == [line.rstrip() for line in lines]


def test_vispa_trace_prints_json_too(file):
    assert json.loads(vispa("trace", file, "--json").stdout) == json.loads(file.read_text())


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"name": "vispa"}', '{"name": "\xe9', "[" * 100_000, '{"children": ' * 3000])
def test_a_file_that_is_no_trace_is_refused_without_telling_what_it_holds(tmp_path, content):
    path = tmp_path / "notes.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(TraceError, match=r"is not a trace.*vispa ask --trace FILE"):
        read_trace(path)
    result = vispa("trace", path)
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_private_file_that_is_no_trace_stays_private(tmp_path):
    path = tmp_path / "notes.json"
    path.write_text(json.dumps({"name": ["Zebedee"], "run_type": {"Zebedee": 1}}))
    assert "Zebedee" not in vispa("trace", path).stderr


def test_a_missing_file_is_refused(tmp_path):
    result = vispa("trace", tmp_path / "none.json")
    assert result.exit_code == 2
    assert "No such file" in result.stderr


def test_a_trace_cannot_steer_the_terminal(make_graph, tmp_path):
    run = traced(make_graph(), INPUTS["overton"]).model_copy(update={"name": "evil\x1b[2Jname [red]"})
    (tmp_path / "trace.json").write_bytes(run.to_json())
    assert vispa("trace", tmp_path / "trace.json").stdout.startswith("evil[2Jname [red] (chain)")


def test_an_odd_but_valid_file_is_drawn(tmp_path):
    odd = {"generations": [[{"message": {"response_metadata": {"steering": {"layers": [], "displacement": 0.5}}}}]]}
    run = {"name": "n", "run_type": "llm", "start": "2026-01-01T00:00:00", "end": None, "inputs": 3, "outputs": odd, "error": "", "tags": []}
    (tmp_path / "trace.json").write_text(json.dumps(run | {"metadata": {}, "children": []}))
    assert "not ended" in vispa("trace", tmp_path / "trace.json").stdout
    assert draw(read_trace(tmp_path / "trace.json")) is not None


@pytest.mark.parametrize(
    ("name", "kind", "outputs", "metadata"),
    [
        ("compose", "chain", {"output": "redacted"}, {}),
        ("judge", "llm", None, {"value": 5}),
        ("TaxonomyRetriever", "retriever", {"documents": None}, {}),
        ("steer", "llm", {"generations": [[{"message": {"response_metadata": {"steering": {"layers": [1]}}}}]]}, {}),
    ],
)
def test_a_file_whose_runs_have_another_shape_is_refused_in_a_line(tmp_path, name, kind, outputs, metadata):
    run = {"name": name, "run_type": kind, "start": "2026-01-01T00:00:00", "end": None, "inputs": 3, "outputs": outputs, "error": None}
    (tmp_path / "trace.json").write_text(json.dumps(run | {"tags": [], "metadata": metadata, "children": []}))
    result = vispa("trace", tmp_path / "trace.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("vispa: The trace cannot be drawn")
    assert vispa("trace", tmp_path / "trace.json", "--json").exit_code == 0


# The command line, traced as the environment says


def tracing_to(url, protocol, cache):
    """An environment with as much patience as the clients may be given."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "VISPA_CACHE": str(cache)}
    environment |= {"LANGSMITH_TRACING": "true", "LANGSMITH_API_KEY": "test", "LANGSMITH_ENDPOINT": url, "LANGSMITH_TIMEOUT_MS": "600000"}
    if protocol == "opentelemetry":
        environment |= {"LANGSMITH_TRACING_MODE": "otel", "OTEL_EXPORTER_OTLP_ENDPOINT": url}
        environment |= {"OTEL_EXPORTER_OTLP_TIMEOUT": "600", "OTEL_BSP_EXPORT_TIMEOUT": "600000"}
    return environment


both_protocols = pytest.mark.parametrize("protocol", ["langsmith", "opentelemetry"])


@pytest.mark.slow
@both_protocols
@pytest.mark.parametrize("endpoint", ["refuses", "never answers"])
@pytest.mark.parametrize("command", [["ask", QUERY, "--value", "karma", "--max-new-tokens", "5", "--json"], ["values", "--query", QUERY, "--json"]])
def test_the_command_line_ends_soon_after_its_answer_although_its_endpoint_is_dead(cache, protocol, endpoint, command):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        url = f"http://127.0.0.1:{9 if endpoint == 'refuses' else silent.getsockname()[1]}"
        with subprocess.Popen(
            [sys.executable, "-m", "vispa_graph", *command], env=tracing_to(url, protocol, cache), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            started = time.monotonic()
            answer = os.read(process.stdout.fileno(), 1)
            answered = time.monotonic()
            answer += process.stdout.read()
            assert process.wait(120) == 0
            ended = time.monotonic()
    assert json.loads(answer)
    # benchmarks/tracing.py measures the two seconds that are allowed. A busy machine takes longer for all, and a client that is waited for 12 and more.
    assert ended - answered < max(4, (answered - started) / 2)


@pytest.mark.slow
@both_protocols
@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["ask", QUERY, "--value", "karma"], {"vispa", "retrieve", "rerank", "steer", "steer karma", "overton", "compose"}),
        (["values", "--query", QUERY], {"ValueReranker"}),
    ],
)
def test_the_command_line_sends_what_it_traced_before_it_ends(cache, collector, protocol, command, names):
    whole = [sys.executable, str(ROOT / "tests" / "mcp_over_stdio.py"), *command]
    subprocess.run(whole, env=tracing_to(collector.url, protocol, cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    assert {run["name"] for run in collector.runs.values()} | {span.name for span in collector.spans} == names
    assert QUERY.encode() not in collector.bytes
