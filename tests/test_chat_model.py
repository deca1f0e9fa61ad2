"""The steered model behaves as any LangChain chat model does."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage

from vispa_graph import SteeredChatModel
from vispa_graph.chat_model import _Stop
from vispa_graph.engine.contract import Generation
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.errors import EngineClosedError, InputError, SettingsError, UnknownValueError

QUESTION = "What do you think?"


class Pieces(FakeEngine):
    """Says a text in given pieces."""

    def __init__(self, pieces):
        super().__init__()
        self.pieces = pieces

    def generate(self, request):
        for piece in self.pieces if request.on_token else []:
            request.on_token(piece)
        future = Future()
        future.set_result(Generation("".join(self.pieces), 3, len(self.pieces), "stop", None, 0, 1))
        return future


def model_of(engine):
    return SteeredChatModel(engine=engine, find_steering=lambda value: None)


async def astream(model, *given, **options):
    return [chunk async for chunk in model.astream(*given, **options)]


def joined(chunks):
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


def read_all_ways(model, stop=None):
    """The answer by invoke, ainvoke, stream and astream."""

    async def both():
        return await model.ainvoke(QUESTION, stop=stop), joined(await astream(model, QUESTION, stop=stop))

    return [model.invoke(QUESTION, stop=stop), joined(list(model.stream(QUESTION, stop=stop))), *asyncio.run(both())]


@pytest.fixture
def model(fake_resources):
    return fake_resources.chat_model


# Values


def test_a_model_for_a_value_is_steered_toward_it_and_shares_the_engine(model):
    steered = model.for_value("Karma")
    assert steered.invoke(QUESTION).text == "Seen from karma, this matters. One should think about karma."
    assert steered.engine is model.engine
    assert model.engine.requests[-1].steering.direction.value == "karma"


def test_making_a_model_for_a_value_leaves_the_first_one_as_it_was(model):
    karma = model.for_value("karma")
    honor = karma.for_value("honor")
    assert [m.invoke(QUESTION).text.split(",")[0] for m in (model, karma, honor)] == ["Seen from nothing", "Seen from karma", "Seen from honor"]


def test_a_model_for_several_values_is_steered_by_each_times_its_weight(model):
    mixed = model.for_values({"power": 0.5, "tradition": -2.0})
    assert {part.direction.value: part.strength for part in mixed.steering.parts} == {"power": 0.5, "tradition": -2.0}
    assert mixed._identifying_params["values"] == {"power": 0.5, "tradition": -2.0}
    with pytest.raises(InputError, match="No value was given"):
        model.for_values({})


def test_an_unknown_value_is_refused_when_the_model_is_made(model):
    with pytest.raises(UnknownValueError):
        model.for_value("no such thing")


def test_it_can_be_made_without_a_graph():
    engine = FakeEngine()
    assert SteeredChatModel.create(engine=engine).for_value("karma").invoke(QUESTION).text.startswith("Seen from karma")


# What is asked and what comes back


def test_messages_reach_the_engine_with_their_roles(model):
    model.invoke(
        [
            SystemMessage("Be brief."),
            HumanMessage("Hello."),
            AIMessage("Hi."),
            ToolMessage("42", tool_call_id="1"),
            HumanMessage([{"type": "text", "text": "Bye."}]),
        ]
    )
    assert model.engine.requests[-1].messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "42"},
        {"role": "user", "content": "Bye."},
    ]


def test_settings_reach_the_engine(make_resources):
    resources = make_resources(max_new_tokens=7, temperature=0.5, seed=11)
    resources.chat_model.invoke(QUESTION)
    request = resources.engine.requests[-1]
    assert (request.max_new_tokens, request.temperature, request.seed) == (7, 0.5, 11)


def test_invoke_stream_and_their_async_twins_say_the_same(model):
    answers = read_all_ways(model.for_value("karma"))
    assert {answer.text for answer in answers} == {"Seen from karma, this matters. One should think about karma."}
    assert all(answer.usage_metadata == answers[0].usage_metadata for answer in answers)
    metadata = [{key: answer.response_metadata[key] for key in ("finish_reason", "cut_tokens", "steering")} for answer in answers]
    assert all(facts == metadata[0] for facts in metadata)


def test_a_stream_comes_piece_by_piece_and_ends_once(model):
    chunks = list(model.stream(QUESTION))
    assert len(chunks) == 1 + len(["Seen", "from", "nothing,", "this", "matters.", "One", "should", "think", "about", "nothing."])
    assert all(isinstance(chunk, AIMessageChunk) for chunk in chunks)
    assert [chunk.chunk_position for chunk in chunks if chunk.chunk_position] == ["last"]


def test_usage_counts_the_tokens_of_prompt_and_answer(model):
    usage = model.invoke(QUESTION).usage_metadata
    assert usage["output_tokens"] == 10
    assert usage["input_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_the_answer_tells_what_steering_did(model):
    steering = model.for_value("karma").invoke(QUESTION).response_metadata["steering"]
    assert len(steering["layers"]) == len(steering["magnitude"]) == len(steering["after"]) > 0
    assert model.invoke(QUESTION).response_metadata["steering"] is None


def test_traces_name_model_and_value_but_hold_no_vectors(model):
    params = model.for_value("karma")._identifying_params
    assert (params["model"], params["value"], params["method"]) == ("fake", "karma", "probe")
    assert "vectors" not in str(params)
    assert "vectors" not in repr(model.for_value("karma"))
    assert model._get_ls_params()["ls_model_name"] == "fake"


def test_many_async_calls_at_once_each_get_their_own_answer(model):
    async def run():
        return await asyncio.gather(*(model.for_value(value).ainvoke(QUESTION) for value in ("karma", "honor", "face")))

    assert [answer.text.split(",")[0] for answer in asyncio.run(run())] == ["Seen from karma", "Seen from honor", "Seen from face"]


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.invoke(QUESTION),
        lambda model: list(model.stream(QUESTION)),
        lambda model: asyncio.run(model.ainvoke(QUESTION)),
        lambda model: asyncio.run(astream(model, QUESTION)),
    ],
    ids=["invoke", "stream", "ainvoke", "astream"],
)
def test_an_engine_s_error_comes_out_however_it_is_called(call):
    with pytest.raises(EngineClosedError, match="closed"):
        call(model_of(FakeEngine(fail=EngineClosedError("The engine is closed."))))


# Stop sequences

letters = st.text("ab\n", max_size=12)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def pieces_of(text, cuts):
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


def before_first_stop(text, stop):
    """The text up to the sequence that is complete first, found letter by letter; of several that end together the longest."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(letters, stops, st.lists(st.integers(0, 20), max_size=6))
def test_a_text_ends_before_its_first_stop_sequence_however_it_is_cut_into_pieces(text, stop, cuts):
    ending = _Stop(stop)
    streamed = "".join(ending.take(piece) for piece in pieces_of(text, cuts)) + ending.rest()
    assert streamed == before_first_stop(text, stop)


@given(letters, st.lists(st.integers(0, 20), max_size=6))
def test_without_stop_sequences_pieces_pass_as_they_come(text, cuts):
    ending = _Stop(None)
    pieces = pieces_of(text, cuts)
    assert [ending.take(piece) for piece in pieces] == pieces
    assert ending.rest() == ""


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["One. ", "Tw", "o. Three."], ["Two"], "One. "),
        (["x", "abc", "d"], ["abcd", "c"], "xab"),
        (["One. ", "Tw"], ["Two"], "One. Tw"),
        (["STOP here"], ["STOP"], ""),
        (["One."], [""], "One."),
    ],
)
def test_every_way_of_calling_stops_at_the_same_place(pieces, stop, expected):
    assert [answer.text for answer in read_all_ways(model_of(Pieces(pieces)), stop)] == [expected] * 4


class Held(FakeEngine):
    """Keeps its request and answers when told to, from another thread."""

    def generate(self, request):
        self.request, self.future = request, Future()
        return self.future

    def say(self, piece):
        thread = threading.Thread(target=self.request.on_token, args=(piece,))
        thread.start()
        thread.join(10)
        assert not thread.is_alive()


def test_the_engine_can_go_on_speaking_when_the_loop_that_listened_is_closed():
    engine, failed = Held(), []

    async def listen_to_the_first_piece():
        stream = model_of(engine).astream(QUESTION)
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        engine.request.on_token("one")
        await first

    before, threading.excepthook = threading.excepthook, failed.append
    try:
        asyncio.run(listen_to_the_first_piece())
        engine.say("two")
    finally:
        threading.excepthook = before
    assert not failed


@pytest.mark.parametrize("way", ["stream", "astream"])
def test_who_stops_listening_to_a_stream_frees_its_row(way):
    engine = Held()

    async def listen():
        stream = model_of(engine).astream(QUESTION)
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        engine.request.on_token("one")
        await first
        await stream.aclose()

    if way == "astream":
        asyncio.run(listen())
    else:
        stream = model_of(engine).stream(QUESTION)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(next, stream)
            while not hasattr(engine, "request"):
                time.sleep(0.001)
            engine.say("one")
            first.result(10)
        stream.close()
    assert engine.future.cancelled()


def test_a_cancelled_async_call_frees_its_row():
    engine = Held()

    async def call():
        task = asyncio.ensure_future(model_of(engine).ainvoke(QUESTION))
        while not hasattr(engine, "request"):
            await asyncio.sleep(0.001)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(call())
    assert engine.future.cancelled()


# What a single call may choose


@pytest.mark.parametrize(
    "call",
    [
        lambda model, **options: model.invoke(QUESTION, **options),
        lambda model, **options: model.bind(**options).invoke(QUESTION),
        lambda model, **options: list(model.stream(QUESTION, **options)),
        lambda model, **options: asyncio.run(model.ainvoke(QUESTION, **options)),
        lambda model, **options: asyncio.run(astream(model, QUESTION, **options)),
    ],
    ids=["invoke", "bind", "stream", "ainvoke", "astream"],
)
def test_a_call_may_choose_its_own_length_temperature_and_seed(model, call):
    call(model, max_new_tokens=3, temperature=0.5, seed=9)
    request = model.engine.requests[-1]
    assert (request.max_new_tokens, request.temperature, request.seed) == (3, 0.5, 9)
    with pytest.raises(SettingsError, match="It takes max_new_tokens, temperature, seed"):
        call(model, top_p=0.5)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"seed": "3"}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            call(model, **wrong)


def test_langsmith_is_told_the_options_of_the_call(model):
    assert model._get_ls_params(temperature=0.5)["ls_temperature"] == 0.5
    assert model._get_ls_params()["ls_temperature"] == 0.0


# The cache of answers


def test_a_cached_answer_is_never_that_of_another_model_direction_or_option(make_resources):
    from dataclasses import replace

    def key(model, **options):
        return model._get_llm_string(**options)

    def other_engine():
        engine = FakeEngine()
        engine.fingerprint = "other"
        return engine

    model = make_resources().chat_model.for_value("karma")
    direction = model.steering.direction
    moved = model.model_copy(update={"steering": replace(model.steering, direction=replace(direction, vectors=direction.vectors + 1))})
    scaled = model.model_copy(update={"steering": replace(model.steering, direction=replace(direction, alpha=direction.alpha + 1))})
    others = [
        moved,
        scaled,
        make_resources(engine=other_engine()).chat_model.for_value("karma"),
        make_resources(strength=2).chat_model.for_value("karma"),
    ]
    one, other = (steering.direction for steering in (model.steering, model.for_value("honor").steering))
    for strength in (1.0, 2.0):  # of a value that is in it twice
        parts = [replace(model.steering, direction=d, strength=s) for d, s in ((one, 1.0), (other, strength), (other, 1.0))]
        others.append(model.model_copy(update={"steering": replace(parts[0], others=tuple(parts[1:]))}))
    keys = [key(model), key(model, seed=3), *map(key, others)]
    assert len(set(keys)) == len(keys)
    assert key(make_resources().chat_model.for_value("karma")) == key(model)


# Giving up, and closing


def test_only_who_streams_has_each_piece_decoded(model):
    model.invoke(QUESTION)
    asyncio.run(model.ainvoke(QUESTION))
    list(model.stream(QUESTION))
    assert [request.on_token is None for request in model.engine.requests] == [True, True, False]


def test_an_interrupted_call_frees_its_row():
    class Interrupted(Future):
        def result(self, timeout=None):
            raise KeyboardInterrupt

    engine = Held()
    engine.generate = lambda request: setattr(engine, "future", Interrupted()) or engine.future
    with pytest.raises(KeyboardInterrupt):
        model_of(engine).invoke(QUESTION)
    assert engine.future.cancelled()


class Slow(FakeEngine):
    """Says one word and then nothing."""

    def __init__(self):
        super().__init__()
        self.future = Future()

    def generate(self, request):
        self.on_token = request.on_token
        request.on_token("One")
        return self.future


def test_a_stream_that_nobody_reads_on_is_cancelled():
    engine = Slow()
    chunks = model_of(engine).stream(QUESTION)
    next(chunks)
    chunks.close()
    assert engine.future.cancelled()


def test_so_is_an_async_one_and_tokens_that_come_after_the_loop_has_closed_do_no_harm():
    engine = Slow()

    async def read_one():
        chunks = model_of(engine).astream(QUESTION)
        await anext(chunks)
        await chunks.aclose()

    asyncio.run(read_one())
    assert engine.future.cancelled()
    engine.on_token("Two")


def test_a_model_that_loaded_its_engine_closes_it_and_a_given_one_stays_open(monkeypatch):
    loaded, given = FakeEngine(), FakeEngine()
    monkeypatch.setattr("vispa_graph.resources.Resources._load_engine", lambda self: loaded)
    model = SteeredChatModel.create()
    steered = model.for_value("karma")
    steered.close()
    model.close()
    assert loaded.closed
    SteeredChatModel.create(engine=given).close()
    assert not given.closed
