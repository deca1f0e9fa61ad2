"""Nothing that a person or a model wrote leaves by any trace or log, unless it was asked for.

Every input, every comment, every answer and every error text holds a marker; every byte that any observer was given is searched.
"""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus

import httpx
import pytest
import requests
from collector import Collector
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.globals import set_debug
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tracers.context import collect_runs, tracing_v2_enabled
from langchain_core.tracers.langchain import LangChainTracer
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, RetryPolicy
from langsmith import Client, traceable, tracing_context
from pydantic import TypeAdapter, ValidationError
from test_tracing import Scripted, drain
from typing_extensions import TypedDict

from vispa_graph import SteeredChatModel, as_tool, select_values
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.errors import BatchError, InputError, NonFiniteError
from vispa_graph.graph import create_graph
from vispa_graph.privacy import REASONS, REDACTED, Redactor, without_text

MARK = "zq7w"


def marked(text):
    return f"{text} {MARK}{text.replace(' ', '')}"


QUERY = marked("Should my father have the operation")
INPUTS = {
    "overton": {"query": QUERY, "optoins": [marked("misspelt")], f"{MARK}key": marked("host key")},
    "steerable": {"query": QUERY, "attribute": marked("a nurse"), "population": marked("Ghana")},
    "distributional": {"query": QUERY, "options": [marked("Yes"), marked("No")], "population": marked("Ghana")},
    "steerable with options": {"query": QUERY, "attribute": marked("a nurse"), "options": [marked("Yes"), marked("No")]},
}


def comment(request):
    return marked(f"One should think of {request.steering.direction.value if request.steering else 'nothing'}") + "."


def noted(*events):
    """All that a handler can read of what it is given, errors' attributes and causes too."""
    errors = [entry for event in events if isinstance(event, tuple) for entry in event if isinstance(entry, BaseException)]
    causes = [cause for error in errors for cause in (error.__cause__, error.__suppress_context__ or error.__context__)]
    return repr((events, [(vars(error), error.args, getattr(error, "message", None)) for error in (*errors, *causes) if hasattr(error, "args")]))


class Recorder(BaseCallbackHandler):
    """A handler of a host that writes down all it is given."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(*given, **named):
            self.seen.append(noted(name, given, named))

        return note


class AsyncRecorder(AsyncCallbackHandler):
    def __init__(self):
        self.seen = []

    async def on_chain_start(self, *given, **named):
        self.seen.append(noted(given, named))

    on_chain_end = on_chain_error = on_chat_model_start = on_llm_end = on_llm_error = on_llm_new_token = on_chain_start
    on_retriever_start = on_retriever_end = on_chain_start


# Observers: what a host may have around. Each yields a configuration and a way to read all that it got.


@contextmanager
def langsmith(collector):
    client = Client(api_url=collector.url, api_key="test")

    def read():
        client.flush()
        # Only the roots: a task that is cancelled because its twin failed may leave its run without an end.
        collector.wait_for(lambda: collector.children() and all(run.get("end_time") for run in collector.children()))
        client.flush()
        return collector.bytes

    yield client, read
    client.cleanup()


@contextmanager
def own_tracer(collector):
    with langsmith(collector) as (client, read):
        yield {"callbacks": [LangChainTracer(client=client)]}, read


@contextmanager
def tracing_context_around(collector):
    with langsmith(collector) as (client, read), tracing_context(enabled=True, client=client):
        yield {}, read


@contextmanager
def tracing_enabled_around(collector):
    with langsmith(collector) as (client, read), tracing_v2_enabled(client=client):
        yield {}, read


@contextmanager
def environment(collector):
    """LANGSMITH_TRACING and its like, as langsmith reads them."""
    from langsmith import run_trees, utils

    def forget():
        utils.get_env_var.cache_clear()
        run_trees._CLIENT = None

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TRACING": "true", "ENDPOINT": collector.url, "API_KEY": "test"}.items():
            patch.setenv(f"LANGSMITH_{name}", value)
        forget()

        def read():
            run_trees.get_cached_client().flush()
            collector.wait_for(lambda: collector.runs and all(run.get("end_time") for run in collector.runs.values()))
            return collector.bytes

        yield {}, read
        run_trees.get_cached_client().cleanup()
    forget()


@contextmanager
def opentelemetry(collector):
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=f"{collector.url}/v1/traces")))
    client = Client(api_url=collector.url, api_key="test", tracing_mode="otel", otel_tracer_provider=provider)

    def read():
        client.flush()
        collector.wait_for(lambda: any(not span.parent_span_id for span in collector.spans))
        return collector.bytes

    yield {"callbacks": [LangChainTracer(client=client)]}, read
    client.cleanup()


@contextmanager
def openinference(collector):
    from openinference.instrumentation.langchain import LangChainInstrumentor
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=f"{collector.url}/v1/traces")))
    LangChainInstrumentor().instrument(tracer_provider=provider)
    yield {}, lambda: collector.bytes
    LangChainInstrumentor().uninstrument()


@contextmanager
def handler(_):
    recorder = Recorder()
    yield {"callbacks": [recorder]}, lambda: "".join(recorder.seen).encode()


@contextmanager
def async_handler(_):
    recorder = AsyncRecorder()
    yield {"callbacks": [recorder]}, lambda: "".join(recorder.seen).encode()


@contextmanager
def run_collector(_):
    with collect_runs() as found:
        yield {}, lambda: repr([run.model_dump() if hasattr(run, "model_dump") else run.dict() for run in found.traced_runs]).encode()


OBSERVERS = {
    observer.__name__: observer
    for observer in (
        own_tracer,
        tracing_context_around,
        tracing_enabled_around,
        environment,
        opentelemetry,
        openinference,
        handler,
        async_handler,
        run_collector,
    )
}


@pytest.fixture
def collector():
    with Collector() as found:
        yield found


@pytest.fixture
def make_graph(make_resources):
    def make(*, checkpointer=None, review=False, **parts):
        resources = make_resources(**({"engine": FakeEngine(answer=comment), "top_k": 2} | parts))
        return create_graph(resources=resources, checkpointer=checkpointer, review=review)

    return make


@pytest.fixture
def logged(caplog, capfd):
    """All that was logged at any level, or printed, so far."""
    caplog.set_level(logging.DEBUG)

    def read():
        printed = capfd.readouterr()
        return (caplog.text + printed.out + printed.err).encode()

    return read


SEARCHED = []


@pytest.fixture(scope="module", autouse=True)
def told(request):
    """Prints how much was searched."""
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{len(SEARCHED)} outputs of observers and logs searched for texts, {sum(SEARCHED)} bytes")  # noqa: T201


def check_private(*read):
    for everything in (reading() for reading in read):
        assert MARK.encode() not in everything
        SEARCHED.append(len(everything))
    return True


# Ways to run


class Case(TypedDict, total=False):
    case: int
    done: bool


def in_a_host_node(graph, config, *, is_async=False):
    """Run the graph in a node of a host."""
    host = host_of(graph, is_async=is_async)
    return asyncio.run(host.ainvoke({"case": 7}, config)) if is_async else host.invoke({"case": 7}, config)


def host_of(graph, *, is_async=False, given=INPUTS["overton"], checkpointer=None):
    """A host that knows its case by number, and looks the words up itself."""

    def call(state):
        return {"done": bool(graph.invoke(given))}

    async def acall(state):
        return {"done": bool(await graph.ainvoke(given))}

    builder = StateGraph(Case)
    builder.add_node("ours", acall if is_async else call)
    builder.add_edge(START, "ours")
    builder.add_edge("ours", END)
    return builder.compile(checkpointer=checkpointer)


def in_a_thread(graph, config):
    from contextvars import copy_context

    with ThreadPoolExecutor(1) as pool:
        pool.submit(copy_context().run, graph.invoke, INPUTS["overton"], config).result()


def in_a_traceable(graph, config):
    traceable(lambda case: bool(graph.invoke(INPUTS["overton"], config)), name="host")(7)


async def events_v3(runnable, data, config):
    stream = await runnable.astream_events(data, config, version="v3")
    await (stream.output() if callable(stream.output) else stream.output)


WAYS = {
    "invoke": lambda graph, config: graph.invoke(INPUTS["overton"], config),
    "ainvoke": lambda graph, config: asyncio.run(graph.ainvoke(INPUTS["overton"], config)),
    "stream": lambda graph, config: list(graph.stream(INPUTS["overton"], config, stream_mode=["updates", "messages"])),
    "astream": lambda graph, config: asyncio.run(drain(graph.astream(INPUTS["overton"], config, stream_mode="messages"))),
    "events": lambda graph, config: asyncio.run(drain(graph.astream_events(INPUTS["overton"], config))),
    "batch": lambda graph, config: graph.batch([INPUTS["overton"]] * 2, config),
    "with_config": lambda graph, config: graph.with_config(config).invoke(INPUTS["overton"]),
    "host node": in_a_host_node,
    "async host node": lambda graph, config: in_a_host_node(graph, config, is_async=True),
    "thread": in_a_thread,
    "traceable": in_a_traceable,
    "tool": lambda graph, config: as_tool(graph).invoke({"query": QUERY}, config),
    "async tool": lambda graph, config: asyncio.run(as_tool(graph).ainvoke({"query": QUERY}, config)),
    "model": lambda graph, config: graph.resources.chat_model.for_value("karma").invoke(QUERY, config),
    "model stream": lambda graph, config: list(graph.resources.chat_model.stream(QUERY, config)),
    "async model": lambda graph, config: asyncio.run(graph.resources.chat_model.ainvoke(QUERY, config)),
    "async model stream": lambda graph, config: asyncio.run(drain(graph.resources.chat_model.astream(QUERY, config))),
    "events v3": lambda graph, config: graph.stream_events(INPUTS["overton"], config, version="v3").output,
    "async events v3": lambda graph, config: asyncio.run(events_v3(graph, INPUTS["overton"], config)),
    "model events v3": lambda graph, config: graph.resources.chat_model.stream_events(QUERY, config, version="v3").output,
    "async model events v3": lambda graph, config: asyncio.run(events_v3(graph.resources.chat_model, QUERY, config)),
}


FEW = ("invoke", "ainvoke", "stream", "host node", "async tool")
PAIRS = [(observer, way) for observer in OBSERVERS for way in (WAYS if observer in ("own_tracer", "environment", "openinference") else FEW)]


@pytest.mark.parametrize(("observer", "way"), PAIRS)
def test_no_byte_that_any_observer_gets_of_any_way_of_running_holds_a_text(make_graph, collector, logged, observer, way):
    with OBSERVERS[observer](collector) as (config, read):
        WAYS[way](make_graph(), config)
        everything = read()
    assert check_private(lambda: everything, logged)
    assert b"fake" in everything or b"vispa" in everything  # it did observe the run


AROUND = ("tracing_context_around", "tracing_enabled_around", "environment", "openinference", "run_collector")
JUDGED = json.dumps([{"id": "karma", "grade": 2, "reason": marked("He said")}])


@pytest.mark.parametrize("parts", [{}, {"reranker": "llm", "main_llm": FakeListChatModel(responses=[JUDGED])}], ids=["default", "llm"])
@pytest.mark.parametrize("observer", AROUND)
def test_the_selection_alone_leaks_neither(make_graph, collector, logged, observer, parts):
    with OBSERVERS[observer](collector) as (_, read):
        assert select_values(QUERY, 2, resources=make_graph(**parts).resources)
        everything = read()
    assert check_private(lambda: everything, logged)
    assert b"ValueReranker" in everything


@pytest.mark.parametrize("observer", AROUND)
def test_of_the_selection_alone_too_every_observer_gets_the_text_where_content_may_be_traced(make_graph, collector, observer):
    with OBSERVERS[observer](collector) as (_, read):
        select_values(QUERY, 2, resources=make_graph(trace_content=True).resources)
        assert MARK.encode() in read()


@pytest.mark.parametrize("observer", list(OBSERVERS))
def test_every_observer_would_get_the_texts_if_they_were_not_left_out(make_graph, collector, observer):
    with OBSERVERS[observer](collector) as (config, read):
        make_graph(trace_content=True).invoke(INPUTS["overton"], config)
        assert MARK.encode() in read()


@pytest.mark.parametrize("parts", [{}, {"aggregation": "compose"}, {"main_llm": FakeListChatModel(responses=[f"A ({MARK})", f"B ({MARK})"])}])
@pytest.mark.parametrize("mode", list(INPUTS))
def test_no_mode_leaks(make_graph, collector, logged, mode, parts):
    with own_tracer(collector) as (config, read):
        make_graph(**parts).invoke(INPUTS[mode], config)
        assert check_private(read, logged)


class Quoting(FakeListChatModel):
    """Fails as APIs do: quoting the prompt."""

    def _call(self, messages, *given, **named):
        raise ConnectionRefusedError(f"bad request: {messages}")


class Refused(Exception):
    """Shaped as the errors of API clients: the prompt is in its attributes too."""

    def __init__(self, message, *, body):
        super().__init__(message)
        self.message, self.body, self.status_code = message, body, 400


class Refusing(FakeListChatModel):
    def _call(self, messages, *given, **named):
        raise Refused(f"content filter: {messages[0].content}", body={"prompt": messages[0].content})


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "host node", "async host node", "async tool"])
@pytest.mark.parametrize("observer", ["handler", "async_handler", "own_tracer", "openinference"])
def test_no_attribute_of_an_error_leaks_to_an_observer_of_ours_or_of_the_host_s_runs(make_graph, collector, logged, observer, way):
    with OBSERVERS[observer](collector) as (config, read):
        with pytest.raises(Refused) as caught:
            WAYS[way](make_graph(main_llm=Refusing(responses=["x"])), config)
        assert check_private(read, logged, lambda: repr(vars(caught.value)).encode())
    assert caught.value.status_code == 400
    assert MARK in caught.value.original.message


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        {"engine": FakeEngine(fail=NonFiniteError(f"{MARK} became NaN"))},
        {"main_llm": Quoting(responses=["x"])},
        {"engine": FakeEngine(fail=KeyError(MARK))},
    ],
)
def test_no_error_leaks_not_into_the_host_s_own_runs_either(make_graph, collector, logged, parts, is_async):
    if "engine" in parts and isinstance(parts["engine"]._fail, NonFiniteError):
        parts = {"engine": FakeEngine(fail=NonFiniteError("The logits became NaN."))}  # ours never quote; the host's runs show them
    with own_tracer(collector) as (config, read):
        with pytest.raises((NonFiniteError, ConnectionRefusedError, KeyError)):
            in_a_host_node(make_graph(**parts), config, is_async=is_async)
        assert check_private(read, logged)
        assert sum("error" in run and bool(run["error"]) for run in collector.runs.values()) >= 3


def test_no_tool_call_that_was_refused_leaks(make_graph, collector, logged):
    with own_tracer(collector) as (config, read):
        tool = as_tool(make_graph())
        for bad in ({"query": QUERY, "mode": MARK}, {"query": QUERY, "extra": MARK}, {"query": QUERY, "values": [MARK]}):
            assert MARK not in str(tool.invoke({"name": tool.name, "args": bad, "id": "1", "type": "tool_call"}, config))
        assert check_private(read, logged)


def test_an_agent_s_own_runs_are_its_own_but_the_tool_s_are_private(make_graph, collector):
    call = AIMessage("", tool_calls=[{"name": "plural_answer", "args": {"query": QUERY}, "id": "1"}])
    from langchain.agents import create_agent

    with own_tracer(collector) as (config, read):
        create_agent(Scripted(messages=iter([call, AIMessage("Done.")])), tools=[as_tool(make_graph())]).invoke(
            {"messages": [("user", QUERY)]}, config
        )
        read()
    [tool] = [run for run in collector.runs.values() if run["run_type"] == "tool"]
    inside = [run for run in collector.runs.values() if run["dotted_order"].startswith(tool["dotted_order"])]
    assert len(inside) > 10
    assert MARK not in repr(inside)
    assert MARK in repr([run for run in collector.runs.values() if run not in inside])


def test_a_review_leaks_neither_what_it_shows_nor_what_comes_back(make_graph, collector, logged):
    graph = make_graph(checkpointer=InMemorySaver(), review=True)
    with own_tracer(collector) as (config, read):
        config = {**config, "configurable": {"thread_id": "1"}}
        graph.invoke(INPUTS["overton"], config)
        assert "problem" in graph.invoke(Command(resume=[MARK]), config)["__interrupt__"][0].value
        graph.invoke(Command(resume=["karma"]), config)
        assert check_private(read, logged)


@pytest.mark.parametrize("mode", list(INPUTS))
def test_a_review_inside_a_host_leaks_nothing_into_the_host_s_own_runs(make_graph, collector, logged, mode):
    with own_tracer(collector) as (config, read):
        host = host_of(make_graph(review=True, fit_attributes=True), given=INPUTS[mode], checkpointer=InMemorySaver())
        config = {**config, "configurable": {"thread_id": "1"}}
        assert "__interrupt__" in host.invoke({"case": 7}, config)
        assert "problem" in host.invoke(Command(resume=["no such value"]), config)["__interrupt__"][0].value
        assert host.invoke(Command(resume=["karma"]), config)["done"]
        assert check_private(read, logged)


def test_a_review_shows_a_host_no_reason_that_a_language_model_wrote(make_graph, collector, logged):
    parts = {"reranker": "llm", "main_llm": FakeListChatModel(responses=[JUDGED, marked("Well") + "."])}
    graph = make_graph(**parts, review=True)
    with own_tracer(collector) as (config, read):
        host = host_of(graph, checkpointer=InMemorySaver())
        config = {**config, "configurable": {"thread_id": "1"}}
        [stop] = host.invoke({"case": 7}, config)["__interrupt__"]
        assert "in the state" in stop.value["values"][0]["reason"]
        assert host.invoke(Command(resume=stop.value["values"]), config)["done"]
        assert check_private(read, logged)


def test_a_reason_that_a_language_model_wrote_stays_in_the_state_and_is_shown_where_content_may_be_traced(make_graph):
    parts = {"reranker": "llm", "main_llm": FakeListChatModel(responses=[JUDGED, "Well."])}
    thread = {"configurable": {"thread_id": "1"}}
    for content in (False, True):
        graph = make_graph(**parts, review=True, checkpointer=InMemorySaver(), trace_content=content)
        [stop] = graph.invoke(INPUTS["overton"], thread)["__interrupt__"]
        assert (MARK in stop.value["values"][0]["reason"]) is content
        assert MARK in graph.get_state(thread).values["values"][0]["reason"]
        assert MARK in graph.invoke(Command(resume=stop.value["values"]), thread)["values"][0]["reason"]


@pytest.mark.parametrize("is_async", [False, True])
def test_what_an_error_of_ours_came_from_leaks_neither(make_graph, collector, logged, is_async):
    def ours():
        try:
            raise RuntimeError(MARK)
        except RuntimeError as error:
            try:
                raise BatchError("The batch failed.") from error
            except BatchError as between:
                outer = NonFiniteError("The logits became NaN.")
                outer.__cause__ = between
                return outer

    with own_tracer(collector) as (config, read):
        with pytest.raises(NonFiniteError) as caught:
            in_a_host_node(make_graph(engine=FakeEngine(fail=ours())), config, is_async=is_async)
        assert check_private(read, logged)
    assert isinstance(caught.value.__cause__.__cause__, RuntimeError)


@pytest.mark.parametrize("way", ["model", "model stream", "async model", "async model stream"])
def test_an_error_inside_a_model_tells_its_caller_no_text(make_graph, way):
    with pytest.raises(KeyError) as caught:
        WAYS[way](make_graph(engine=FakeEngine(fail=KeyError(MARK))), {})
    assert MARK not in f"{caught.value} {caught.value!r}"


def test_metadata_holds_labels_numbers_and_texts_of_the_taxonomy_only():
    given = {"seed": MARK, "layers": [1, MARK], "value": MARK, "family": MARK, "role": MARK, "ls_anything": MARK, "langgraph_auth_user": MARK}
    shown = Redactor({"karma"}).metadata({**given, "value": "karma", "temperature": 0.5, "langgraph_step": 1, "thread_id": "t"})
    assert MARK not in repr(Redactor({"karma"}).metadata(given))
    assert shown["value"] == "karma"
    assert shown["layers"] == [1, REDACTED]
    assert (shown["temperature"], shown["langgraph_step"], shown["thread_id"]) == (0.5, 1, "t")


def test_a_main_model_with_tracers_of_its_own_does_not_leak(make_graph, collector, logged):
    with own_tracer(collector) as (config, read):
        graph = make_graph(main_llm=FakeListChatModel(responses=[f"Well {MARK}."], callbacks=config["callbacks"]))
        graph.invoke(INPUTS["overton"])
        assert check_private(read, logged)
        assert [run["name"] for run in collector.runs.values()] == ["summarise"]


def test_debug_output_does_not_leak(make_graph, logged):
    set_debug(True)
    try:
        make_graph().invoke(INPUTS["overton"])
    finally:
        set_debug(False)
    printed = logged()
    assert b"steer" in printed
    assert MARK.encode() not in printed


def test_metadata_and_configuration_of_the_caller_do_not_pass_but_the_thread_does(make_graph, collector):
    with own_tracer(collector) as (config, read):
        metadata = {"patient": MARK, f"{MARK} of ward 4": 1, "settings": {"ward": MARK}, "model": {MARK: MARK}, "engine": 7}
        given = {"metadata": metadata, "configurable": {"record": MARK, "thread_id": "t-1"}}
        make_graph(checkpointer=InMemorySaver()).invoke(INPUTS["overton"], {**config, **given})
        assert check_private(read)
    assert {run["extra"]["metadata"].get("thread_id") for run in collector.runs.values() if run["name"] == "vispa"} == {"t-1"}


def test_a_model_made_without_a_graph_is_private_too(collector, logged):
    with own_tracer(collector) as (config, read):
        model = SteeredChatModel(engine=FakeEngine(answer=comment), find_steering=lambda value: None, callbacks=config["callbacks"])
        model.invoke(QUERY)
        list(model.stream(QUERY))
        assert check_private(read, logged)
        assert len(collector.runs) == 2


# What stays


def test_the_caller_s_own_streams_and_results_hold_everything(make_graph):
    graph = make_graph()
    assert MARK in graph.invoke(INPUTS["overton"])["response"]
    said = "".join(chunk.text for chunk, _ in graph.stream(INPUTS["overton"], {"callbacks": [Recorder()]}, stream_mode="messages"))
    assert MARK in said
    assert MARK in repr(asyncio.run(drain(graph.astream_events(INPUTS["overton"], {"callbacks": [Recorder()]}))))


@pytest.mark.parametrize("way", list(WAYS))
def test_a_handler_gets_every_event_once(make_graph, way):
    class Ids(BaseCallbackHandler):
        def __init__(self):
            self.ids = []

        def on_chain_start(self, *_, run_id, **__):
            self.ids.append(run_id)

        on_chat_model_start = on_tool_start = on_retriever_start = on_chain_start

    handler = Ids()
    WAYS[way](make_graph(), {"callbacks": [handler]})
    assert handler.ids
    assert len(set(handler.ids)) == len(handler.ids)


def test_tokens_are_counted_once(make_graph, monkeypatch):
    model = "vispa_graph.chat_model._metadata"
    from vispa_graph import chat_model

    told = chat_model._metadata
    monkeypatch.setattr(model, lambda *given: told(*given) | {"model_name": "fake"})
    with get_usage_metadata_callback() as usage:
        out = make_graph(aggregation="compose").invoke(INPUTS["overton"])
    assert usage.usage_metadata["fake"]["output_tokens"] == sum(comment["tokens"] for comment in out["comments"])


def test_the_caller_s_context_is_as_it_was_before(make_graph):
    from langchain_core.tracers.context import run_collector_var

    with collect_runs() as found:
        parts = make_graph().stream(INPUTS["overton"])
        next(parts)
        assert run_collector_var.get() is found
        parts.close()
        assert run_collector_var.get() is found


def test_reasons_and_values_are_shown(make_graph):
    reasons = set()
    for data in ({"values": ["karma"]}, {"attribute": "karma"}, {"attribute": marked("a nurse")}, {}):
        for parts in ({}, {"aggregation": "compose"}):
            seen = Recorder()
            out = make_graph(**parts).invoke({"query": QUERY, **data}, {"callbacks": [seen]})
            reasons |= {value["reason"] for value in out["values"]} | ({out["chosen"]["reason"]} if out["chosen"] else set())
            shown = "".join(seen.seen)
            assert all(
                repr(value["reason"])[1:-1] in shown.replace("\\\\'", "'").replace("\\'", "'") or value["reason"] in shown for value in out["values"]
            )
    assert reasons - {reason for reason in reasons if reason.startswith(("like", "about"))} <= REASONS


def test_an_error_keeps_its_class_and_what_it_carries_but_not_its_text(make_graph):
    class Limited(ValueError):
        def __init__(self, status):
            super().__init__(f"{MARK} at {status}")
            self.status = status

    class Failing(FakeListChatModel):
        def _call(self, *given, **named):
            raise Limited(429)

    with pytest.raises(Limited) as caught:
        make_graph(main_llm=Failing(responses=[""])).invoke(INPUTS["overton"])
    assert caught.value.status == 429
    assert MARK not in f"{caught.value} {caught.value!r}"
    assert MARK in str(caught.value.original)
    assert caught.value.__suppress_context__
    with pytest.raises(Limited, match=MARK):
        make_graph(main_llm=Failing(responses=[""]), trace_content=True).invoke(INPUTS["overton"])


class Demanding(Exception):
    def __new__(cls, one, two):
        return super().__new__(cls, one, two)

    def __init__(self, one, two):
        self.two = two


class Slotted(ValueError):
    __slots__ = ("status", "text")

    def __init__(self, status, text):
        self.status, self.text = status, text


class Unchanging(Exception):
    def __setattr__(self, *_):
        raise TypeError("it cannot be changed")


class Sealed(ConnectionError):
    def __init_subclass__(cls, *, key):
        pass


ERRORS = [
    OSError(5, MARK, MARK),
    UnicodeDecodeError("utf-8", b"x", 0, 1, MARK),
    KeyboardInterrupt(MARK),
    Refused(MARK, body=MARK),
    Demanding(MARK, 2),
    Slotted(404, MARK),
    Unchanging(MARK),
    ExceptionGroup(MARK, [ValueError(MARK), Refused(MARK, body=MARK)]),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_can_be_shown_without_its_text_and_stays_one_of_its_class(error):
    shown = without_text(error)
    assert isinstance(shown, type(error))
    assert type(shown).__name__ == type(error).__name__
    assert MARK not in f"{shown!r} {shown} {vars(shown)} {shown.args} {getattr(shown, 'exceptions', '')} {getattr(shown, 'filename', '')}"
    assert shown.original is None
    assert without_text(error, keeps_original=True).original is error


def test_the_numbers_that_an_error_carries_remain():
    assert without_text(OSError(5, MARK)).errno == 5
    assert without_text(Slotted(404, MARK)).status == 404
    assert vars(without_text(Refused(MARK, body=MARK))) == {"status_code": 400}
    coded = Refused(MARK, body=None)
    coded.code, coded.retry, coded.__notes__ = HTTPStatus.TOO_MANY_REQUESTS, True, [MARK]
    assert repr(vars(without_text(coded))) == "{'body': None, 'status_code': 400, 'code': 429, 'retry': True}"


def test_the_errors_of_a_group_can_be_told_apart_and_hold_no_text():
    shown = without_text(ExceptionGroup(MARK, [ValueError(MARK), Refused(MARK, body=MARK)]))
    values, others = shown.split(ValueError)
    assert [type(error).__name__ for error in values.exceptions] == ["ValueError"]
    assert [vars(error) for error in others.exceptions] == [{"status_code": 400}]
    assert MARK not in f"{values!r} {values.exceptions} {others!r} {others.exceptions}"


def test_an_error_whose_class_cannot_be_derived_from_is_shown_as_the_nearest_that_can():
    shown = without_text(Sealed(MARK))
    assert isinstance(shown, ConnectionError)
    assert not isinstance(shown, Sealed)
    assert type(shown).__name__ == "Sealed"
    with pytest.raises(ValidationError) as invalid:
        TypeAdapter(int).validate_python(MARK)
    assert isinstance(without_text(invalid.value), ValueError)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_is_shown_of_an_error_can_be_pickled_and_takes_no_text_along(error):
    pickled = pickle.dumps(without_text(error, keeps_original=True))
    assert MARK.encode() not in pickled
    loaded = pickle.loads(pickled)
    assert isinstance(loaded, type(error))
    assert vars(loaded) == vars(without_text(error))


@pytest.mark.parametrize("status", [404, 503])
@pytest.mark.parametrize("library", ["httpx", "requests"])
def test_a_host_decides_whether_to_try_again_as_by_the_error_itself(library, status):
    if library == "httpx":
        request = httpx.Request("POST", f"http://{MARK}/")
        error = httpx.HTTPStatusError(MARK, request=request, response=httpx.Response(status, text=MARK, request=request))
    else:
        answered = requests.Response()
        answered.status_code, answered._content = status, MARK.encode()
        error = requests.HTTPError(MARK, response=answered)
    shown = without_text(error, keeps_original=True)
    tried_again = RetryPolicy().retry_on
    assert tried_again(shown) == tried_again(error)
    assert MARK not in repr(vars(shown))
    assert pickle.loads(pickle.dumps(shown)).response.status_code == status


# Content on request


def test_content_is_traced_on_request(make_graph, collector):
    with own_tracer(collector) as (config, read):
        make_graph(trace_content=True).invoke(INPUTS["distributional"], config)
        everything = read().decode()
    for text in (QUERY, marked("Ghana"), marked("Yes"), comment(type("R", (), {"steering": None}))[:10]):
        assert text in everything


@pytest.fixture
def scrubbed(make_resources, collector):
    def run(scrubber, **settings):
        from vispa_graph.resources import Resources
        from vispa_graph.settings import Settings

        made = make_resources(engine=FakeEngine(answer=comment))
        resources = Resources(
            Settings(top_k=2, **settings),
            engine=made.engine,
            encoder=made.encoder,
            value_encoder=made.value_encoder,
            taxonomy=made.taxonomy,
            scrubber=scrubber,
        )
        with own_tracer(collector) as (config, read):
            create_graph(resources=resources).invoke(INPUTS["distributional"], config)
            return read().decode()

    return run


def test_a_scrubber_lets_content_through_without_what_it_takes_out(scrubbed):
    everything = scrubbed(lambda text: text.replace(MARK, "<MARK>"), trace_content=True)
    assert MARK not in everything
    assert "Should my father have the operation <MARK>" in everything
    assert "Yes <MARK>Yes" in everything


def test_a_scrubber_alone_lets_nothing_through(scrubbed):
    assert MARK not in scrubbed(lambda text: text)


def test_where_a_scrubber_fails_nothing_passes_and_the_run_goes_on(scrubbed, caplog):
    def fails(text):
        raise ValueError(text)

    everything = scrubbed(fails, trace_content=True)
    assert "father have" not in everything
    assert "The scrubber failed (ValueError)" in caplog.text
    assert MARK not in caplog.text


def test_a_reason_with_a_score_before_a_phrase_of_the_taxonomy_is_shown():
    redactor = Redactor({'like "a test"'})
    for reason in ('like "a test"', 'entailed with probability 0.93; like "a test"', 'cross-encoder score 0.07; like "a test"'):
        assert redactor.value({"reason": reason}) == {"reason": reason}
        assert redactor.value({"query": reason, "text": reason})["query"] == REDACTED
    for reason in (f"entailed with probability 0.93; {MARK}", f'{MARK} cross-encoder score 0.07; like "a test"', "cross-encoder score 0.07; "):
        assert redactor.value({"reason": reason}) == {"reason": REDACTED}


def test_what_is_not_known_is_left_out():
    redactor = Redactor({"karma"})
    assert redactor.value({"value": "karma", "query": "karma", "score": 1, MARK: 3, "other": {"a": 1}}) == {
        "value": "karma",
        "query": REDACTED,
        "score": 1,
        "redacted keys": 2,
    }
    assert redactor.value(object()) == REDACTED
    assert redactor.value([b"bytes", {1, 2}]) == [REDACTED, REDACTED]
    message = AIMessage(
        MARK,
        name=MARK,
        additional_kwargs={"reasoning": MARK},
        response_metadata={"logprobs": {"content": [{"token": MARK, "bytes": [1]}]}, "finish_reason": "stop"},
        tool_calls=[{"name": MARK, "args": {MARK: MARK}, "id": "1"}],
        odd=MARK,
    )
    assert MARK not in repr(redactor.value(message))
    assert redactor.value(message).response_metadata["finish_reason"] == "stop"
    assert MARK not in repr(redactor.value(HumanMessage([{"type": "text", "text": MARK}, {"type": "image", "url": MARK}])))


def test_input_that_is_refused_at_the_door_leaves_no_run(make_graph, logged):
    seen = Recorder()
    with pytest.raises(InputError):
        make_graph().invoke({"query": QUERY, "mode": MARK}, {"callbacks": [seen]})
    assert MARK not in "".join(seen.seen)
    assert check_private(logged)
