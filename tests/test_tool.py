"""The graph as a tool in somebody else's agent."""

from __future__ import annotations

import asyncio
import json

import pytest
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command

from vispa_graph import as_tool, create_graph
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.errors import NonFiniteError
from vispa_graph.state import Output

QUERY = "Should my father, 84, have an operation he does not want?"
PRIVATE = "Okafor"

both_ways = pytest.mark.parametrize(
    "run", [lambda agent, *given: agent.invoke(*given), lambda agent, *given: asyncio.run(agent.ainvoke(*given))], ids=["sync", "async"]
)


class Scripted(FakeMessagesListChatModel):
    """Says what it is told to, and takes any tools."""

    def bind_tools(self, tools, **options):
        return self


def agent_that_calls(tool, arguments, **options):
    call = AIMessage("", tool_calls=[{"name": tool.name, "args": arguments, "id": "call-1"}])
    return create_agent(Scripted(responses=[call, AIMessage("Here is what people would say.")]), [tool], **options)


def answer_of(state):
    [message] = [message for message in state["messages"] if isinstance(message, ToolMessage)]
    return message


def plain_agent_that_calls(tool, arguments, **options):
    """The same as a graph of one's own: a model node, a ToolNode, and the loop between them."""
    call = AIMessage("", tool_calls=[{"name": tool.name, "args": arguments, "id": "call-1"}])
    model = Scripted(responses=[call, AIMessage("Here is what people would say.")])
    builder = StateGraph(MessagesState)
    builder.add_node("model", lambda state: {"messages": [model.invoke(state["messages"])]})
    builder.add_node("tools", ToolNode([tool]))
    builder.add_edge(START, "model")
    builder.add_conditional_edges("model", tools_condition, ["tools", END])
    builder.add_edge("tools", "model")
    return builder.compile(**options)


every_agent = pytest.mark.parametrize("agent_with", [agent_that_calls, plain_agent_that_calls], ids=["create_agent", "plain graph"])
ASK = {"messages": [{"role": "user", "content": QUERY}]}


@both_ways
@every_agent
def test_an_agent_gets_the_answer_as_text_and_the_whole_output_as_artifact(fake_graph, run, agent_with):
    state = run(agent_with(as_tool(fake_graph), {"query": QUERY, "values": ["karma", "honor"]}), ASK)
    message = answer_of(state)
    assert message.status == "success"
    assert message.artifact == fake_graph.invoke({"query": QUERY, "values": ["karma", "honor"]})
    assert set(message.artifact) == set(Output.__annotations__)
    assert message.artifact["response"] in message.content
    assert "Values heard: Karma, Honor." in message.content
    assert state["messages"][-1].content == "Here is what people would say."


@both_ways
def test_every_argument_reaches_the_graph(fake_graph, run):
    arguments = {"query": QUERY, "mode": "steerable", "attribute": "karma", "population": "Ghana", "options": ["Yes", "No"], "values": ["honor"]}
    artifact = answer_of(run(agent_that_calls(as_tool(fake_graph), arguments), ASK)).artifact
    assert artifact["mode"] == "steerable"
    assert set(artifact["distribution"]) == {"Yes", "No"}
    assert [value["id"] for value in artifact["values"]] == ["karma", "honor"]


@both_ways
def test_text_alone_is_the_question(fake_graph, run):
    assert run(as_tool(fake_graph), QUERY) == run(as_tool(fake_graph), {"query": QUERY})


def test_notes_are_part_of_what_the_agent_reads(make_resources):
    graph = create_graph(resources=make_resources(aggregation="compose"))
    message = answer_of(agent_that_calls(as_tool(graph), {"query": QUERY, "attribute": "a nurse"}).invoke(ASK))
    assert "\nNote: The answer was not made from the attribute itself" in message.content


@both_ways
@every_agent
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "query: Field required"),
        ({"query": ""}, "query: "),
        ({"query": QUERY, "mode": PRIVATE}, "mode: "),
        ({"query": QUERY, "options": PRIVATE}, "options: "),
        ({"query": QUERY, "patient": PRIVATE}, "arguments that are not known; known are query, mode, attribute"),
        ({"query": QUERY, f"{PRIVATE}'s age": 84}, "arguments that are not known"),
        ({"query": " "}, "The query is empty"),
        ({"query": PRIVATE, "mode": "steerable"}, "needs an attribute"),
        ({"query": PRIVATE, "options": [PRIVATE]}, "options, and 1 came"),
        ({"query": PRIVATE, "options": [PRIVATE, PRIVATE]}, "Options 1 and 2 are the same"),
        ({"query": QUERY, "values": [PRIVATE]}, "not in the taxonomy of 31 values"),
    ],
)
def test_bad_arguments_come_back_as_a_message_the_agent_can_read_and_never_repeat_them(fake_graph, run, agent_with, arguments, problem):
    state = run(agent_with(as_tool(fake_graph), arguments), ASK)
    message = answer_of(state)
    assert message.status == "error"
    assert problem in message.content
    assert PRIVATE.lower() not in message.content.lower()
    assert state["messages"][-1].content == "Here is what people would say."


def test_a_model_that_fails_is_told_to_the_agent_as_an_error(make_resources):
    graph = create_graph(resources=make_resources(engine=FakeEngine(fail=NonFiniteError("Logits became NaN."))))
    message = answer_of(agent_that_calls(as_tool(graph), {"query": QUERY}).invoke(ASK))
    assert message.status == "error"
    assert message.content == "Logits became NaN."


def test_the_schema_tells_an_agent_what_every_argument_means(fake_graph):
    tool = as_tool(fake_graph)
    schema = tool.tool_call_schema.model_json_schema()
    assert set(schema["properties"]) == {"query", "mode", "attribute", "population", "options", "values"}
    assert schema["required"] == ["query"]
    assert all(described.get("description") for described in schema["properties"].values())
    json.dumps(schema)
    assert (tool.name, "not medical" in tool.description) == ("plural_answer", True)
    assert as_tool(fake_graph, name="ask_values", description="Ask.").name == "ask_values"


@both_ways
def test_it_works_outside_an_agent_too(fake_graph, run):
    assert "Values heard: Karma." in run(as_tool(fake_graph), {"query": QUERY, "values": ["karma"]})


def test_what_runs_inside_the_tool_is_part_of_the_caller_s_run(fake_graph):
    agent = agent_that_calls(as_tool(fake_graph), {"query": QUERY, "values": ["karma"]})

    async def names():
        return {event["name"] async for event in agent.astream_events(ASK, version="v2")}

    assert {"plural_answer", "vispa", "retrieve", "steer", "steer karma", "summarise"} <= asyncio.run(names())


@both_ways
@every_agent
def test_a_review_inside_the_tool_stops_the_agent_and_is_resumed_through_it(fake_resources, run, agent_with):
    graph = create_graph(resources=fake_resources, review=True)
    agent = agent_with(as_tool(graph), {"query": QUERY}, checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": "one"}}
    [stop] = run(agent, ASK, thread)["__interrupt__"]
    assert len(stop.value["values"]) == 6
    state = run(agent, Command(resume=["karma"]), thread)
    assert [comment["value"] for comment in answer_of(state).artifact["comments"]] == ["karma"]


# What a host sees while the tool runs


def parts_of(agent, asynchronously, subgraphs):
    options = {"stream_mode": ["messages", "custom"], "subgraphs": subgraphs}
    if not asynchronously:
        return list(agent.stream(ASK, **options))

    async def collect():
        return [part async for part in agent.astream(ASK, **options)]

    return asyncio.run(collect())


@every_agent
@pytest.mark.parametrize("asynchronously", [False, True], ids=["sync", "async"])
def test_tokens_and_progress_reach_a_host_that_asks_for_subgraphs(fake_graph, agent_with, asynchronously):
    agent = agent_with(as_tool(fake_graph), {"query": QUERY, "values": ["karma", "honor"]})
    out, said, progress = fake_graph.invoke({"query": QUERY, "values": ["karma", "honor"]}), {}, []
    for _, kind, part in parts_of(agent, asynchronously, subgraphs=True):
        if kind == "custom":
            progress.append(part)
        elif part[1]["langgraph_node"] in ("steer", "overton"):
            whose = part[1].get("value", "overton")
            said.setdefault(whose, []).append(part[0].text)
    assert {whose: "".join(pieces) for whose, pieces in said.items()} == {c["value"]: c["text"] for c in out["comments"]} | {
        "overton": out["response"]
    }
    assert all(len(pieces) > 3 for pieces in said.values())
    assert sorted(event["value"] for event in progress) == ["honor", "karma"]


@every_agent
def test_nothing_from_inside_reaches_a_host_that_does_not_ask_for_it(fake_graph, agent_with):
    agent = agent_with(as_tool(fake_graph), {"query": QUERY, "values": ["karma"]})
    nodes = {part[1]["langgraph_node"] for kind, part in parts_of(agent, False, subgraphs=False) if kind == "messages"}
    assert nodes <= {"model", "tools"}
