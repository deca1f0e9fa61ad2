"""The graph inside somebody else's: as a node, called in a node, and as a tool. Whose checkpointer counts, on which thread, and what goes on."""

from __future__ import annotations

import asyncio
import time
import warnings

import pytest
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command
from typing_extensions import TypedDict

from vispa_graph import as_tool
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.errors import InputError, ThreadError
from vispa_graph.graph import create_graph

FIRST = "My niece is 30 and refuses a transfusion because of her faith. May the doctors respect that?"
FOLLOW_UP = "And if she were 16?"
READ_TOGETHER = "Read together with the earlier question of this thread."
TWO = ["karma", "honor"]
THREAD = {"configurable": {"thread_id": "one"}}
CASE = {"configurable": {"thread_id": "case 7"}}


def invoked(graph, *given, **options):
    return graph.invoke(*given, **options)


def awaited(graph, *given, **options):
    return asyncio.run(graph.ainvoke(*given, **options))


def streamed(graph, *given, **options):
    *_, last = graph.stream(*given, stream_mode="values", **options)
    return last


both_ways = pytest.mark.parametrize("run", [invoked, awaited], ids=["sync", "async"])
every_way = pytest.mark.parametrize("run", [invoked, awaited, streamed], ids=["sync", "async", "stream"])
every_place = pytest.mark.parametrize("place", ["node", "call", "tool"])
with_and_without = pytest.mark.parametrize("kept", [False, True], ids=["host keeps nothing", "host keeps"])


class Asked(TypedDict, total=False):
    query: str
    asked: list[str]
    response: str
    notes: list[str]


class Host:
    """A graph around `inner`, which it asks as one of its nodes, by a call in a node, or as a tool."""

    def __init__(self, inner, place, saver=None):
        self.place = place
        builder = StateGraph(MessagesState if place == "tool" else Asked)
        builder.add_node("ask", getattr(self, f"_{place}")(inner))
        builder.add_edge(START, "ask")
        self.graph = builder.compile(checkpointer=saver)

    def ask(self, run, query, config=THREAD, **options):
        if self.place != "tool":
            return run(self.graph, {"query": query}, config, **options)
        call = {"name": "plural_answer", "args": {"query": query, "values": TWO}, "id": query}
        message = run(self.graph, {"messages": [AIMessage("", tool_calls=[call])]}, config, **options)["messages"][-1]
        assert message.status == "success", message.content
        return message.artifact

    def _node(self, inner):
        return inner

    def _tool(self, inner):
        return ToolNode([as_tool(inner)])

    def _call(self, inner):
        async def acall(state):
            return await inner.ainvoke({"query": state["query"], "values": TWO})

        return RunnableLambda(lambda state: inner.invoke({"query": state["query"], "values": TWO}), acall)


class SlowSaver(InMemorySaver):
    """Takes its time, and counts the checkpoints of runs inside another that it has begun and finished to write."""

    def __init__(self):
        super().__init__(serde=JsonPlusSerializer(allowed_msgpack_modules=None))
        self.begun = self.finished = 0

    def put(self, config, *given):
        inside = bool(config["configurable"].get("checkpoint_ns"))
        self.begun += inside
        time.sleep(0.1)
        put = super().put(config, *given)
        self.finished += inside
        return put


class Watching(FakeEngine):
    """Notes, whenever a comment is asked for, how many checkpoints were begun and finished."""

    def __init__(self, saver):
        super().__init__()
        self.saver, self.seen = saver, []

    def generate(self, request):
        if request.steering:
            self.seen.append((self.saver.begun, self.saver.finished))
        return super().generate(request)


# Whose checkpointer counts


@every_place
@every_way
@pytest.mark.parametrize("own", [False, True], ids=["without its own", "with its own"])
def test_in_a_host_that_keeps_nothing_it_answers_and_keeps_nothing(make_resources, place, run, own):
    inner = create_graph(resources=make_resources(top_k=2), checkpointer=InMemorySaver() if own else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Host(inner, place).ask(run, FIRST)["response"]
    assert not own or not inner.get_state(THREAD).values


@every_place
@every_way
@pytest.mark.parametrize("own", [False, True], ids=["without its own", "with its own"])
def test_in_a_host_that_keeps_its_runs_each_step_is_written_before_a_comment_is_made(make_resources, place, run, own):
    saver = SlowSaver()
    engine = Watching(saver)
    inner = create_graph(resources=make_resources(engine=engine, top_k=2), checkpointer=InMemorySaver() if own else None)
    assert Host(inner, place, saver).ask(run, FIRST)["response"]
    assert len(engine.seen) == 2
    for begun, finished in engine.seen:
        assert begun == finished > 2
    assert not own or not inner.get_state(THREAD).values


@both_ways
@pytest.mark.parametrize("around", [False, True], ids=["the caller", "the host"])
def test_whoever_chose_when_steps_are_written_has_the_choice(make_resources, run, around):
    saver = SlowSaver()
    engine = Watching(saver)
    inner = create_graph(resources=make_resources(engine=engine, top_k=2), checkpointer=None if around else saver)
    if around:
        Host(inner, "node", saver).ask(run, FIRST, durability="exit")
    else:
        run(inner, {"query": FIRST}, THREAD, durability="exit")
    assert set(engine.seen) == {(0, 0)}


@every_place
def test_a_graph_that_is_to_keep_nothing_keeps_nothing_in_a_host_either(make_resources, place):
    saver = SlowSaver()
    assert Host(create_graph(resources=make_resources(top_k=2), checkpointer=False), place, saver).ask(invoked, FIRST)["response"]
    assert saver.begun == 0


def test_so_it_cannot_stop_for_a_review(make_resources):
    inner = create_graph(resources=make_resources(top_k=2), checkpointer=False, review=True)
    with pytest.raises(ThreadError, match="stops for review"):
        Host(inner, "node", InMemorySaver()).ask(invoked, FIRST)


# On which thread


@every_place
@both_ways
@with_and_without
def test_a_thread_bound_to_the_graph_stays_its_thread_in_every_host(make_resources, place, run, kept):
    inner = create_graph(resources=make_resources(top_k=2), checkpointer=InMemorySaver())
    host = Host(inner.with_config(CASE), place, InMemorySaver() if kept else None)
    host.ask(run, FIRST, {"configurable": {"thread_id": "1"}})
    assert READ_TOGETHER in host.ask(run, FOLLOW_UP, {"configurable": {"thread_id": "2"}})["notes"]
    assert inner.get_state(CASE).values["turns"] == [FIRST, FOLLOW_UP]


@both_ways
@with_and_without
@pytest.mark.parametrize("saver", [None, True, False])
def test_a_bound_thread_that_nothing_would_keep_is_refused(make_resources, run, kept, saver):
    inner = create_graph(resources=make_resources(top_k=2), checkpointer=saver).with_config(CASE)
    with pytest.raises(ThreadError, match=r"no checkpointer of its own to keep it in\. Give create_graph one"):
        Host(inner, "node", InMemorySaver() if kept else None).ask(run, FIRST)


@both_ways
def test_a_review_on_a_bound_thread_is_refused_since_the_host_would_not_stop_with_it(make_resources, run):
    inner = create_graph(resources=make_resources(top_k=2), checkpointer=InMemorySaver(), review=True).with_config(CASE)
    with pytest.raises(ThreadError, match="the graph around it would not stop too"):
        Host(inner, "node", InMemorySaver()).ask(run, FIRST)


def test_outside_of_hosts_a_thread_given_beside_the_input_goes_before_a_bound_one(make_resources):
    inner = create_graph(resources=make_resources(top_k=2), checkpointer=InMemorySaver())
    inner.with_config(CASE).invoke({"query": FIRST}, THREAD)
    assert inner.get_state(THREAD).values["turns"] == [FIRST]
    assert not inner.get_state(CASE).values


# Follow-ups


@every_place
@both_ways
@pytest.mark.parametrize("follows", [None, True])
def test_follow_ups_on_the_host_s_thread_are_read_with_earlier_questions_where_that_is_asked_for(make_resources, place, run, follows):
    host = Host(create_graph(resources=make_resources(top_k=2), checkpointer=follows), place, InMemorySaver())
    assert host.ask(run, FIRST)["notes"] == []
    assert host.ask(run, FOLLOW_UP)["notes"] == ([READ_TOGETHER] if follows else [])
    assert host.ask(run, FOLLOW_UP, {"configurable": {"thread_id": "another"}})["notes"] == []


def test_a_review_that_follows_up_waits_and_goes_on_with_its_host(make_resources):
    inner = create_graph(resources=make_resources(top_k=2), checkpointer=True, review=True)
    host = Host(inner, "node", InMemorySaver())
    for query in (FIRST, FOLLOW_UP):
        assert host.graph.invoke({"query": query}, THREAD)["__interrupt__"]
        notes = host.graph.invoke(Command(resume=TWO), THREAD)["notes"]
    assert notes == [READ_TOGETHER]


# What a host hands back of an earlier answer


class Sharing(TypedDict, total=False):
    query: str
    mode: str
    options: list[str] | None
    values: list
    response: str
    distribution: dict | None
    notes: list[str]


@both_ways
def test_the_mode_of_an_earlier_answer_does_not_decide_a_later_one(make_resources, run):
    builder = StateGraph(Sharing).add_node("ask", create_graph(resources=make_resources(top_k=2))).add_edge(START, "ask")
    host = builder.compile(checkpointer=InMemorySaver())
    assert run(host, {"query": FIRST}, THREAD)["mode"] == "overton"
    second = run(host, {"query": FOLLOW_UP, "options": ["Yes", "No"]}, THREAD)
    assert second["mode"] == "distributional"
    assert set(second["distribution"]) == {"Yes", "No"}
    assert any("The mode came with the values of an earlier answer" in note for note in second["notes"])
    third = run(host, {"query": FOLLOW_UP, "options": None}, THREAD)
    assert (third["mode"], third["distribution"]) == ("overton", None)
    chosen = run(host, {"query": FOLLOW_UP, "options": ["Yes", "No"], "mode": "overton", "values": None}, THREAD)
    assert chosen["mode"] == "overton"


def test_an_unchanged_mode_is_no_matter_of_note(make_resources):
    builder = StateGraph(Sharing).add_node("ask", create_graph(resources=make_resources(top_k=2))).add_edge(START, "ask")
    host = builder.compile(checkpointer=InMemorySaver())
    for query in (FIRST, FOLLOW_UP):
        assert run_notes(host, query) == []


def run_notes(host, query):
    return host.invoke({"query": query}, THREAD)["notes"]


# Commands


@both_ways
@pytest.mark.parametrize(
    "command",
    [
        Command(resume=TWO, update={"mode": "nonsense"}),
        Command(update=[("query", "Another question?")]),
        Command(resume=TWO, goto="overton"),
        Command(goto="steer"),
        Command(resume=TWO, graph=Command.PARENT),
    ],
    ids=["resume and update", "update", "resume and goto", "goto", "parent"],
)
def test_a_command_goes_on_with_a_run_and_does_nothing_past_the_door(make_resources, run, command):
    graph = create_graph(resources=make_resources(top_k=2), checkpointer=InMemorySaver(), review=True)
    run(graph, {"query": FIRST, "values": TWO}, THREAD)
    with pytest.raises(InputError, match=r"without update, goto or graph"):
        run(graph, command, THREAD)
    out = run(graph, Command(resume=TWO), THREAD)
    assert [comment["value"] for comment in out["comments"]] == TWO
