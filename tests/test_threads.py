"""Threads that go on: what a follow-up sees, what turns never share, and with which settings a run may be resumed."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models import FakeListChatModel
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command

from vispa_graph.conversation import LONGEST, RECALLED, as_read, reading_notes, recall
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.errors import EngineClosedError, NonFiniteError, ResumeError, ThreadError
from vispa_graph.graph import create_graph
from vispa_graph.provenance import NOT_DECISIVE
from vispa_graph.resources import Profile
from vispa_graph.settings import Settings

FIRST = "My niece is 30 and refuses a transfusion because of her faith. May the doctors respect that?"
FOLLOW_UP = "And if she were 16?"
OPTIONS = ["Yes", "No"]
TWO = ["karma", "honor"]
THREAD = {"configurable": {"thread_id": "one"}}

both_ways = pytest.mark.parametrize(
    "run", [lambda graph, *given: graph.invoke(*given), lambda graph, *given: asyncio.run(graph.ainvoke(*given))], ids=["sync", "async"]
)


class Saver(InMemorySaver):
    """Tells when a first comment is kept."""

    def __init__(self):
        super().__init__(serde=JsonPlusSerializer(allowed_msgpack_modules=None))
        self.kept = threading.Event()

    def put_writes(self, config, writes, task_id, task_path=""):
        super().put_writes(config, writes, task_id, task_path)
        if any(channel == "comments" and isinstance(comments, list) for channel, comments in writes):
            self.kept.set()


@pytest.fixture
def saver():
    return Saver()


def prompts(engine):
    return [request.messages[0]["content"] for request in engine.requests]


def heard(out):
    return [comment["value"] for comment in out["comments"]]


# What a follow-up sees


@both_ways
@pytest.mark.parametrize("more", [{}, {"attribute": "a nurse"}, {"options": OPTIONS}, {"attribute": "the right to refuse"}], ids=str)
def test_comments_and_answer_of_a_follow_up_are_about_the_earlier_question_too(make_resources, saver, run, more):
    engine = FakeEngine()
    graph = create_graph(resources=make_resources(engine=engine), checkpointer=saver)
    run(graph, {"query": FIRST, "values": TWO}, THREAD)
    asked = len(engine.requests)
    out = run(graph, {"query": FOLLOW_UP, "values": TWO, **more}, THREAD)
    assert len(prompts(engine)[asked:]) >= 3
    for prompt in prompts(engine)[asked:]:
        assert f"{FIRST}\n{FOLLOW_UP}" in prompt
    assert "Read together with the earlier question of this thread." in out["notes"]


def test_values_are_selected_by_the_follow_up_and_what_it_follows(make_resources, saver):
    graph = create_graph(resources=make_resources(), checkpointer=saver)
    alone = {value["id"]: value for value in graph.invoke({"query": FOLLOW_UP}, {"configurable": {"thread_id": "other"}})["values"]}
    graph.invoke({"query": FIRST}, THREAD)
    together = {value["id"]: value for value in graph.invoke({"query": FOLLOW_UP}, THREAD)["values"]}
    assert any("faith" in value["reason"] for value in together.values())
    assert not any("faith" in value["reason"] for value in alone.values())
    assert "spirituality" in together
    assert "spirituality" not in alone


def test_no_answer_or_comment_of_ours_reaches_a_later_turn(make_resources, saver):
    engine = FakeEngine(answer=lambda request: "Marzipan is what matters here.")
    graph = create_graph(resources=make_resources(engine=engine), checkpointer=saver)
    graph.invoke({"query": FIRST, "values": TWO}, THREAD)
    asked = len(engine.requests)
    graph.invoke({"query": FOLLOW_UP, "values": TWO}, THREAD)
    steered = [request for request in engine.requests[asked:] if request.steering]
    assert len(steered) == 2
    assert not any("Marzipan" in request.messages[0]["content"] for request in steered)


def test_a_turn_that_was_never_answered_is_not_followed_up(make_resources, saver):
    failing = make_resources(engine=FakeEngine(fail=NonFiniteError("NaN")))
    with pytest.raises(NonFiniteError):
        create_graph(resources=failing, checkpointer=saver).invoke({"query": FIRST, "values": TWO}, THREAD)
    engine = FakeEngine()
    out = create_graph(resources=make_resources(engine=engine), checkpointer=saver).invoke({"query": FOLLOW_UP, "values": TWO}, THREAD)
    assert not any(FIRST in prompt for prompt in prompts(engine))
    assert out["notes"] == []


def test_other_threads_and_graphs_without_a_checkpointer_remember_nothing(make_resources, saver):
    engine = FakeEngine()
    graph = create_graph(resources=make_resources(engine=engine), checkpointer=saver)
    bare = create_graph(resources=graph.resources)
    graph.invoke({"query": FIRST, "values": TWO}, THREAD)
    asked = len(engine.requests)
    graph.invoke({"query": FOLLOW_UP, "values": TWO}, {"configurable": {"thread_id": "other"}})
    bare.invoke({"query": FOLLOW_UP, "values": TWO})
    assert not any(FIRST in prompt for prompt in prompts(engine)[asked:])


@given(asked=st.lists(st.text(min_size=1, max_size=3), max_size=12), query=st.text(min_size=1, max_size=3))
def test_what_is_recalled_is_bounded_keeps_the_opening_question_and_ends_with_this_one(asked, query):
    turns = recall(asked, query)
    assert turns[-1] == query
    assert query not in turns[1:-1]
    assert len(turns) <= RECALLED + 1
    assert turns[:-1][:1] == asked[:1]
    assert turns[:-1][1:] == [question for question in asked[1:] if question not in (asked[0], query)][-(RECALLED - 1) :]
    assert bool(reading_notes(turns)) == bool(set(asked[:1]) - {query} or turns[1:-1])


@given(queries=st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_the_opening_question_is_never_forgotten(queries):
    turns = []
    for query in queries:
        turns = recall(turns, query)
    assert as_read(turns)[0] == queries[0]
    assert as_read(turns)[-1] == queries[-1]


def test_long_earlier_questions_are_read_in_part_and_the_reader_is_told():
    turns = ["a" * (LONGEST + 1)]
    for number in range(3):  # in every later turn
        turns = recall(turns, f"{FOLLOW_UP} {number}")
        assert as_read(turns)[0] == "a" * LONGEST
        assert len(reading_notes(turns)) == 2


def test_the_reader_is_told_where_earlier_questions_make_the_text_too_long_for_the_selection(make_resources, saver):
    graph = create_graph(resources=make_resources(), checkpointer=saver)
    half = "Should my father have the operation? " * 22
    assert not any("longer than" in note for note in graph.invoke({"query": half}, THREAD)["notes"])
    assert any("with the earlier questions, is longer than" in note for note in graph.invoke({"query": f"And now? {half}"}, THREAD)["notes"])


def test_a_thread_does_not_grow_with_its_turns(make_resources, saver):
    graph = create_graph(resources=make_resources(), checkpointer=saver)
    for number in range(7):
        graph.invoke({"query": f"Question {number}?", "values": ["karma"]}, THREAD)
    kept = graph.get_state(THREAD).values
    assert kept["turns"] == ["Question 0?", "Question 3?", "Question 4?", "Question 5?", "Question 6?"]
    assert len(kept["comments"]) == 1


# What turns never share


@both_ways
def test_no_comment_or_note_of_an_earlier_turn_counts_in_a_later_one(make_resources, saver, run):
    graph = create_graph(resources=make_resources(), checkpointer=saver)
    first = run(graph, {"query": FIRST, "options": OPTIONS, "values": ["karma", "honor", "fairness"], "atribute": "x"}, THREAD)
    second = run(graph, {"query": FOLLOW_UP, "options": OPTIONS, "values": ["ubuntu"]}, THREAD)
    assert heard(first) == ["karma", "honor", "fairness"]
    assert heard(second) == ["ubuntu"]
    assert second["notes"] == ["Read together with the earlier question of this thread."]
    alone = create_graph(resources=graph.resources).invoke({"query": f"{FIRST}\n{FOLLOW_UP}", "options": OPTIONS, "values": ["ubuntu"]})
    assert second["distribution"] == alone["distribution"]


def test_conversations_that_go_on_at_the_same_time_never_mix(make_resources, saver, capsys):
    graph, turns = create_graph(resources=make_resources(), checkpointer=saver), 8

    def converse(number):
        thread, chance = {"configurable": {"thread_id": str(number)}}, random.Random(number)
        for turn in range(turns):
            values = chance.sample(["karma", "honor", "fairness", "ubuntu", "power"], chance.randint(1, 3))
            out = graph.invoke({"query": f"Case {number}, turn {turn}?", "values": values}, thread)
            assert heard(out) == values
            assert len(out["notes"]) == (turn > 0)
            assert out["attribution"] or out["response"]
        return graph.get_state(thread).values["turns"]

    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(converse, range(4)))
    assert kept == [[f"Case {number}, turn {turn}?" for turn in (0, 4, 5, 6, 7)] for number in range(4)]
    with capsys.disabled():
        print(f"\n4 conversations at the same time, {turns} turns each")  # noqa: T201


def test_a_new_turn_while_a_review_waits_starts_afresh(make_resources, saver):
    graph = create_graph(resources=make_resources(), checkpointer=saver, review=True)
    graph.invoke({"query": FIRST, "values": TWO}, THREAD)
    graph.invoke({"query": FOLLOW_UP, "values": ["ubuntu"]}, THREAD)
    out = graph.invoke(Command(resume=["ubuntu"]), THREAD)
    assert heard(out) == ["ubuntu"]
    assert out["notes"] == []


# With what a run may be resumed

DIFFERENT = {"strength": 2.0, "seed": 7, "temperature": 0.5, "model": "another", "revision": "v2", "dtype": "bfloat16", "max_new_tokens": 9}


class Failing(FakeEngine):
    """Fails for honor, once the other comment is kept."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def generate(self, request):
        if request.steering and request.steering.direction.value == "honor":
            assert self.kept.wait(20)
            raise NonFiniteError("NaN")
        return super().generate(request)


def broken_off(make_resources, saver):
    """A thread on which one of two comments was finished."""
    resources = make_resources(engine=Failing(saver.kept))
    with pytest.raises(NonFiniteError):
        create_graph(resources=resources, checkpointer=saver).invoke({"query": FIRST, "values": TWO}, THREAD)


@both_ways
@pytest.mark.parametrize(("name", "value"), DIFFERENT.items())
def test_a_run_is_not_resumed_with_other_settings_and_the_error_names_them(make_resources, saver, run, name, value):
    broken_off(make_resources, saver)
    engine = FakeEngine()
    graph = create_graph(resources=make_resources(engine=engine, **{name: value}), checkpointer=saver)
    with pytest.raises(ResumeError, match=rf"another {name} than"):
        run(graph, None, THREAD)
    assert engine.requests == []


def test_nor_with_other_weights_under_the_same_name(make_resources, saver):
    broken_off(make_resources, saver)
    other = FakeEngine()
    other.fingerprint = "other weights"
    with pytest.raises(ResumeError, match="another engine than"):
        create_graph(resources=make_resources(engine=other), checkpointer=saver).invoke(None, THREAD)
    assert other.requests == []


def test_nor_aggregated_by_another_model_when_all_comments_are_finished(make_resources, saver):
    silent = make_resources(main_llm=FakeListChatModel(responses=[" "]))
    with pytest.raises(Exception, match="empty summary"):
        create_graph(resources=silent, checkpointer=saver).invoke({"query": FIRST, "values": TWO}, THREAD)
    with pytest.raises(ResumeError, match="another main_llm than"):
        create_graph(resources=make_resources(), checkpointer=saver).invoke(None, THREAD)


def test_nor_with_other_defaults_of_the_model(make_resources, saver, monkeypatch):
    broken_off(make_resources, saver)
    monkeypatch.setattr("vispa_graph.resources.Resources._read_profile", lambda self: Profile(target_probability=0.7))
    with pytest.raises(ResumeError, match="another profile than"):
        create_graph(resources=make_resources(), checkpointer=saver).invoke(None, THREAD)


def test_nor_after_a_review(make_resources, saver):
    create_graph(resources=make_resources(), checkpointer=saver, review=True).invoke({"query": FIRST, "values": TWO}, THREAD)
    with pytest.raises(ResumeError, match="another strength than"):
        create_graph(resources=make_resources(strength=3), checkpointer=saver, review=True).invoke(Command(resume=TWO), THREAD)


@both_ways
def test_with_the_same_settings_only_what_was_not_finished_is_made(make_resources, saver, run):
    broken_off(make_resources, saver)
    engine = FakeEngine()
    out = run(create_graph(resources=make_resources(engine=engine, linger_ms=3, batch_tokens=999), checkpointer=saver), None, THREAD)
    assert [request.steering.direction.value for request in engine.requests if request.steering] == ["honor"]
    assert heard(out) == TWO


def test_a_new_turn_may_take_other_settings(make_resources, saver):
    create_graph(resources=make_resources(), checkpointer=saver).invoke({"query": FIRST, "values": TWO}, THREAD)
    engine = FakeEngine()
    other = create_graph(resources=make_resources(engine=engine, strength=3), checkpointer=saver)
    out = other.invoke({"query": FOLLOW_UP, "values": TWO}, THREAD)
    assert heard(out) == TWO
    assert {request.steering.strength for request in engine.requests if request.steering} == {3}
    assert other.get_state(THREAD).values["made_with"]["strength"] == 3


def test_every_setting_that_is_not_about_where_and_how_fast_decides_who_may_resume(make_resources):
    made = make_resources().made_with
    assert set(made) >= set(Settings.model_fields) - NOT_DECISIVE
    assert not set(made) & (NOT_DECISIVE - {"encoder"})


# Closing


def test_a_closed_graph_loads_no_model_again(encoder, taxonomy):
    graph = create_graph(encoder=encoder, taxonomy=taxonomy)
    graph.close()
    with pytest.raises(EngineClosedError, match="Create a new graph"):
        graph.invoke({"query": FIRST, "values": TWO})


# What a run needs to be kept


def awaited(graph, *given):
    return asyncio.run(graph.ainvoke(*given))


@both_ways
@pytest.mark.parametrize("config", [None, {}, *({"configurable": chosen} for chosen in ({}, {"user": "me"}, {"thread_id": None}, {"thread_id": ""}))])
@pytest.mark.parametrize("content", [False, True])
def test_with_a_checkpointer_a_run_without_a_thread_is_refused_before_it_begins(run, config, content, make_resources):
    graph = create_graph(resources=make_resources(trace_content=content), checkpointer=InMemorySaver())
    with pytest.raises(ThreadError, match="thread_id"):
        run(graph, {"query": FIRST}, config)


@both_ways
@pytest.mark.parametrize("given", [None, Command(resume=TWO)])
def test_without_a_checkpointer_there_is_nothing_to_go_on_with(run, given, make_resources):
    with pytest.raises(ThreadError, match="no checkpointer"):
        run(create_graph(resources=make_resources()), given, THREAD)


@both_ways
@pytest.mark.parametrize("content", [False, True])
def test_a_thread_that_holds_no_stopped_run_says_so(run, content, make_resources):
    graph = create_graph(resources=make_resources(trace_content=content), checkpointer=InMemorySaver())
    with pytest.raises(ThreadError, match="nothing to go on with"):
        run(graph, None, THREAD)


@both_ways
def test_a_command_to_go_on_that_holds_nothing_says_so(run, make_resources):
    with pytest.raises(ThreadError, match="command to go on is empty"):
        run(create_graph(resources=make_resources(), checkpointer=InMemorySaver()), Command(resume=None), THREAD)


@both_ways
def test_a_graph_that_stops_for_review_needs_a_checkpointer(run, make_resources):
    with pytest.raises(ThreadError, match="stops for review"):
        run(create_graph(resources=make_resources(), review=True), {"query": FIRST})


def test_a_saver_that_cannot_be_awaited_is_named_with_what_to_do(tmp_path, make_resources):
    with SqliteSaver.from_conn_string(str(tmp_path / "runs.db")) as saver:
        graph = create_graph(resources=make_resources(), checkpointer=saver)
        with pytest.raises(ThreadError, match=r"SqliteSaver cannot be awaited. Use invoke"):
            awaited(graph, {"query": FIRST}, THREAD)


def test_a_saver_of_ones_own_that_leaves_the_async_half_to_its_base_class_is_named_too(make_resources):
    class Mine(BaseCheckpointSaver):
        def get_tuple(self, config):
            return None

    with pytest.raises(ThreadError, match="Mine cannot be awaited"):
        awaited(create_graph(resources=make_resources(), checkpointer=Mine()), {"query": FIRST}, THREAD)


def test_a_saver_that_must_be_awaited_is_named_with_what_to_do(tmp_path, make_resources):
    async def call():
        async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "runs.db")) as saver:
            graph = create_graph(resources=make_resources(), checkpointer=saver)
            with pytest.raises(ThreadError, match=r"AsyncSqliteSaver cannot be called without await. Use ainvoke"):
                graph.invoke({"query": FIRST}, THREAD)

    asyncio.run(call())


def test_what_a_node_does_not_implement_stays_its_own_error(make_resources):
    class Bare(FakeListChatModel):
        def _call(self, *_, **__):
            raise NotImplementedError("the models own")

    graph = create_graph(resources=make_resources(main_llm=Bare(responses=["x"])), checkpointer=InMemorySaver())
    with pytest.raises(NotImplementedError):
        graph.invoke({"query": FIRST}, THREAD)


def hosted(node, checkpointer=None):
    host = StateGraph(dict)
    host.add_node("ask", node)
    host.add_edge(START, "ask")
    return host.compile(checkpointer=checkpointer)


def test_inside_another_graph_thread_and_checkpointer_are_that_graphs(make_resources):
    inner = create_graph(resources=make_resources(), review=True)
    host = hosted(lambda _: inner.invoke({"query": FIRST}), InMemorySaver())
    assert host.invoke({"n": 1}, THREAD)["__interrupt__"]
    assert host.invoke(Command(resume=TWO), THREAD)["response"]


def test_inside_a_graph_that_keeps_nothing_a_review_is_refused(make_resources):
    inner = create_graph(resources=make_resources(), review=True, checkpointer=InMemorySaver())
    with pytest.raises(ThreadError, match="The graph around it has none"):
        hosted(lambda _: inner.invoke({"query": FIRST})).invoke({"n": 1})


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("bound", [False, True])
def test_inside_another_graph_a_thread_that_is_named_is_a_thread_of_its_own(kept, bound, make_resources):
    case = {"configurable": {"thread_id": "case 7"}}
    inner = create_graph(resources=make_resources(), checkpointer=InMemorySaver())
    called, given = (inner.with_config(case), None) if bound else (inner, case)
    questions = iter([FIRST, FOLLOW_UP])
    host = hosted(lambda _: called.invoke({"query": next(questions), "values": TWO}, given), kept and InMemorySaver())
    for run in "12":
        host.invoke({"n": 1}, {"configurable": {"thread_id": run}})
    assert inner.get_state(case).values["turns"] == [FIRST, FOLLOW_UP]


def test_a_thread_may_be_named_beside_the_other_keys_of_a_configuration(make_resources):
    graph = create_graph(resources=make_resources(), checkpointer=InMemorySaver())
    graph.invoke({"query": FIRST, "values": TWO}, {"thread_id": "one"})
    assert graph.get_state(THREAD).values["turns"] == [FIRST]


def test_a_thread_that_is_none_inside_a_graph_that_keeps_its_runs_is_that_graphs(make_resources):
    inner = create_graph(resources=make_resources(), review=True)
    host = hosted(lambda _: inner.invoke({"query": FIRST}, {"configurable": {"thread_id": None}}), InMemorySaver())
    assert host.invoke({"n": 1}, THREAD)["__interrupt__"]


def test_to_take_the_checkpointer_of_a_graph_around_there_must_be_one(make_resources):
    with pytest.raises(ThreadError, match="there is none"):
        create_graph(resources=make_resources(), checkpointer=True).invoke({"query": FIRST}, THREAD)
