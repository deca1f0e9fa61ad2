"""What resources promise whoever shares them: nothing is made twice, and nobody waits for what it does not need."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vispa_graph.engine.fake import FakeEngine
from vispa_graph.engine.huggingface import HuggingFaceEngine
from vispa_graph.errors import EngineClosedError
from vispa_graph.graph import create_graph
from vispa_graph.resources import Resources
from vispa_graph.settings import Settings

PATIENCE = 30  # seconds, where something waits for what it should not


class Loader:
    """Loads a fake engine once it is let."""

    def __init__(self):
        self.begun, self.let = threading.Event(), threading.Event()
        self.loaded = []

    def __call__(self, *given, **named):
        self.begun.set()
        assert self.let.wait(PATIENCE)
        self.loaded.append(FakeEngine())
        return self.loaded[-1]


@pytest.fixture
def loader(monkeypatch):
    loader = Loader()
    monkeypatch.setattr(HuggingFaceEngine, "load", loader)
    return loader


@pytest.fixture
def resources(loader, word_encoder, taxonomy):
    return Resources(Settings(method="mean_difference"), encoder=word_encoder, taxonomy=taxonomy)


def test_the_event_loop_goes_on_while_a_run_loads_the_model(loader, resources):
    async def run():
        answer = asyncio.create_task(create_graph(resources=resources).ainvoke({"query": "May I lie?", "values": ["karma"]}))
        assert await asyncio.to_thread(loader.begun.wait, PATIENCE)
        assert resources.method  # what the loop asks for beside it
        assert resources.privacy
        loader.let.set()
        return await answer

    assert asyncio.run(run())["response"]


def test_what_several_threads_ask_for_is_made_once(loader, resources):
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(lambda: resources.engine) for _ in range(4)]
        assert loader.begun.wait(PATIENCE)
        loader.let.set()
    assert {id(future.result()) for future in found} == {id(loader.loaded[0])}
    assert len(loader.loaded) == 1


def test_closing_waits_for_no_load_and_what_was_loading_is_closed_too(loader, resources):
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(lambda: resources.engine)
        assert loader.begun.wait(PATIENCE)
        resources.close()
        assert not loader.loaded
        loader.let.set()
        with pytest.raises(EngineClosedError):
            loading.result()
    assert loader.loaded[0].closed


def test_closing_and_other_steering_wait_for_no_fit_of_an_attribute(make_resources, monkeypatch):
    resources = make_resources(method="mean_difference")
    assert resources.steering("karma")
    begun, let, fit = threading.Event(), threading.Event(), resources._fit

    def slow(*given):
        begun.set()
        assert let.wait(PATIENCE)
        return fit(*given)

    monkeypatch.setattr(resources, "_fit", slow)
    with ThreadPoolExecutor(1) as pool:
        fitting = pool.submit(resources.attribute_steering, "a nurse")
        assert begun.wait(PATIENCE)
        assert resources.steering("honor")
        resources.close()
        assert not fitting.done()
        let.set()
        assert fitting.result().direction


def test_directions_that_tell_nothing_apart_are_warned_of_in_one_short_line(make_resources, monkeypatch, caplog):
    monkeypatch.setattr("vispa_graph.engine.directions.SEPARATES", 1.01)
    resources = make_resources()
    count = len(resources.directions)
    (said,) = [record.getMessage() for record in caplog.records if "held-out" in record.getMessage()]
    assert said.startswith(f"{count} of {count} directions do not tell held-out sentences apart")
    assert "`vispa fit` shows all" in said
    assert len(said) < 300
