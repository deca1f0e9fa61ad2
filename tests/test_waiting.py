"""What waits for models: the same in sync and async runs, and in async ones without holding a thread."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler

from vispa_graph.engine.fake import FakeEngine
from vispa_graph.graph import create_graph
from vispa_graph.settings import Settings
from vispa_graph.waiting import Wait, answer_of, arun_steps, run_steps, settled

QUERY = "Should my father have the operation?"
HELD = {
    "summary": {"query": QUERY, "values": ["karma"]},
    "choice": {"query": QUERY, "values": ["karma", "honor"], "attribute": "a nurse"},
    "score": {"query": QUERY, "values": ["karma"], "options": ["Yes", "No"]},
}


class Held(FakeEngine):
    """Comments at once; keeps whatever else it is asked until `release`."""

    def __init__(self):
        super().__init__()
        self.held = []

    def generate(self, request):
        return super().generate(request) if request.steering else self.hold(super().generate, request)

    def score(self, request):
        return self.hold(super().score, request)

    def hold(self, answer, request):
        future = Future()
        self.held.append((future, answer, request))
        return future

    def release(self):
        for future, answer, request in self.held:
            if not future.done():
                future.set_result(answer(request).result())


@pytest.fixture
def held(cache, taxonomy, word_encoder):
    engine = Held()
    two = taxonomy.subset(["karma", "honor"])
    graph = create_graph(Settings(top_k=2, fit_attributes=False), engine=engine, encoder=word_encoder, taxonomy=two)
    assert graph.resources.directions  # fitted before the runs that are watched
    return engine, graph


async def until(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("waits_for", ["summary", "score"])
def test_async_runs_wait_in_the_engine_however_few_threads_there_are_and_leave_those_to_the_host(held, waits_for):
    engine, graph = held

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        runs = [asyncio.create_task(graph.ainvoke(HELD[waits_for])) for _ in range(20)]
        await until(lambda: len(engine.held) == 20)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "the host's own"), 30)
        engine.release()
        return await asyncio.gather(*runs)

    assert all(out["response"] for out in asyncio.run(main()))


@pytest.mark.parametrize("waits_for", list(HELD))
def test_cancelling_an_async_run_cancels_what_it_asked_of_the_engine_and_leaves_no_run_open(held, waits_for):
    engine, graph = held
    tracer = RunCollectorCallbackHandler()

    async def main():
        run = asyncio.create_task(graph.ainvoke(HELD[waits_for], {"callbacks": [tracer]}))
        await until(lambda: engine.held)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    asyncio.run(main())
    assert all(future.cancelled() for future, _, _ in engine.held)
    scored = [run for root in tracer.traced_runs for node in root.child_runs for run in node.child_runs if run.name == "score options"]
    assert bool(scored) == (waits_for == "score")
    assert all(run.end_time and "CancelledError" in run.error for run in scored)


def test_a_chat_model_that_judges_the_values_is_awaited_too(make_resources):
    class Judge(BaseChatModel):
        """Answers async only, once it is let."""

        @property
        def _llm_type(self):
            return "judge"

        def _generate(self, *given, **named):
            raise AssertionError("asked in a thread")

        async def _agenerate(self, *given, **named):
            await asyncio.sleep(0)
            graded = json.dumps([{"id": "karma", "grade": 2, "reason": "it is about deeds"}])
            return ChatResult(generations=[ChatGeneration(message=AIMessage(graded))])

    graph = create_graph(resources=make_resources(main_llm=Judge(), reranker="llm", aggregation="compose", top_k=1))
    out = asyncio.run(graph.ainvoke({"query": QUERY}))
    assert [(value["id"], value["reason"]) for value in out["values"]] == [("karma", "it is about deeds")]


# The generators themselves


def test_one_cancelled_while_it_computes_is_closed_once_the_thread_is_done_with_it():
    entered, goes_on, closed = threading.Event(), threading.Event(), threading.Event()

    def steps():
        entered.set()
        goes_on.wait(60)
        try:
            yield Wait(lambda: None, lambda: asyncio.sleep(0))
        finally:
            closed.set()

    kept = steps()  # so that it is not closed for being forgotten

    async def main():
        run = asyncio.create_task(arun_steps(kept))
        await until(entered.is_set)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert not closed.is_set()
        goes_on.set()
        await until(closed.is_set)

    asyncio.run(main())


def both(steps):
    """The outcome of a fresh generator, sync and async, which must agree."""
    found = []
    for run in (lambda: run_steps(steps()), lambda: asyncio.run(arun_steps(steps()))):
        try:
            found.append(run())
        except Exception as error:
            found.append(repr(error))
    assert found[0] == found[1]
    return found[0]


def waiting_for(now):
    async def later():
        return now()

    return Wait(now, later)


def test_what_is_waited_for_comes_back_and_the_last_word_is_the_result():
    def steps():
        first = yield waiting_for(lambda: 1)
        second = yield waiting_for(lambda: first + 1)
        return [first, second]

    assert both(steps) == [1, 2]
    assert both(lambda: (yield from ())) is None


def test_an_error_is_raised_where_it_was_waited_and_may_be_caught_there():
    def steps():
        try:
            yield waiting_for(lambda: 1 / 0)
        except ZeroDivisionError:
            return (yield waiting_for(lambda: "mended"))

    assert both(steps) == "mended"
    assert both(lambda: (yield waiting_for(lambda: 1 / 0))) == repr(ZeroDivisionError("division by zero"))


def test_futures_give_their_results_and_their_errors_in_their_order():
    def begin():
        futures = [Future(), Future()]
        futures[0].set_exception(ValueError("no"))
        futures[1].set_result(2)
        return futures

    def steps():
        found = yield from settled(begin)
        return list(map(repr, found))

    assert both(steps) == [repr(ValueError("no")), "2"]


def test_nothing_is_computed_in_the_event_loop():
    def steps():
        threads = [threading.current_thread()]
        yield waiting_for(lambda: None)
        return [*threads, threading.current_thread()]

    assert threading.main_thread() not in asyncio.run(arun_steps(steps()))


def test_a_component_is_asked_sync_or_async_as_the_run_is():
    class Component:
        def invoke(self, given, config, **options):
            return ("sync", given, options)

        async def ainvoke(self, given, config, **options):
            return ("async", given, options)

    assert run_steps(answer_of(Component(), 1, {}, k=2)) == ("sync", 1, {"k": 2})
    assert asyncio.run(arun_steps(answer_of(Component(), 1, {}, k=2))) == ("async", 1, {"k": 2})
