"""What the tests share: one cache folder, the taxonomy, encoders, and graphs on an engine without a model."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest

from vispa_graph.engine.fake import FakeEngine
from vispa_graph.graph import create_graph
from vispa_graph.resources import Resources
from vispa_graph.settings import Settings
from vispa_graph.taxonomy_index import SentenceEncoder, Taxonomy


class WordEncoder:
    """Sentences are near when they share words: an encoder that costs nothing. Keeps what it encoded."""

    fingerprint = "words"

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def fits(self, text):
        return True

    def encode(self, sentences):
        self.encoded += sentences
        vectors = np.full((len(sentences), 64), 1e-3, dtype=np.float32)
        for row, sentence in enumerate(sentences):
            for word in sentence.lower().split():
                vectors[row, hashlib.sha256(word.strip(".,!?").encode()).digest()[0] % 64] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """One cache folder for the whole run, and none of the settings of whoever runs it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("VISPA_")]:
            patch.delenv(name)
        patch.setenv("VISPA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def taxonomy():
    return Taxonomy.load()


@pytest.fixture(scope="session")
def encoder():
    """The real MiniLM."""
    return SentenceEncoder()


@pytest.fixture(scope="session")
def value_encoder():
    """The same with the adapter for the values at stake."""
    return SentenceEncoder(adapted=True)


@pytest.fixture(scope="session")
def word_encoder():
    return WordEncoder()


@pytest.fixture
def make_resources(cache, taxonomy, encoder, value_encoder):
    """Resources on a fake engine, with the settings given."""

    def make(*, engine=None, main_llm=None, **settings):
        parts = {"encoder": encoder, "value_encoder": value_encoder, "taxonomy": taxonomy}
        return Resources(Settings(**settings), engine=engine or FakeEngine(), main_llm=main_llm, **parts)

    return make


@pytest.fixture
def fake_resources(make_resources):
    return make_resources()


@pytest.fixture
def fake_graph(fake_resources):
    return create_graph(resources=fake_resources)
