"""An index of one's own phrases: exact when small, close to exact when large, and never unreadable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vispa_graph
from vispa_graph.errors import InputError, StoreError
from vispa_graph.taxonomy_index import Entry, PhraseIndex, phrase_index, vectors

DIMENSIONS = 16


class Numbers:
    """An encoder of texts that are seeds: each gives a random unit vector."""

    fingerprint = "numbers"

    def fits(self, text):
        return True

    def encode(self, sentences):
        return np.concatenate([random_vectors(1, int(sentence)) for sentence in sentences])


def random_vectors(n, seed):
    found = np.random.default_rng(seed).normal(size=(n, DIMENSIONS)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def entries(numbers, families=("right", "duty")):
    return [Entry(f"e{number}", str(number), families[number % len(families)]) for number in numbers]


@pytest.fixture
def small_steps(monkeypatch):
    """Approximate from 200 entries on, so that a test sees all that a million entries would bring about."""
    for module in (vectors, phrase_index):
        monkeypatch.setattr(module, "EXACT_UP_TO", 200)


def test_a_small_index_is_exact(tmp_path):
    index = PhraseIndex(tmp_path / "index", Numbers())
    index.add(entries(range(100)))
    cosines = Numbers().encode([str(number) for number in range(100)]) @ Numbers().encode(["7"])[0]
    expected = [f"e{number}" for number in np.argsort(-cosines)[:10]]
    hits = index.search("7", 10)
    assert [hit.entry.id for hit in hits] == expected
    assert hits[0].entry == Entry("e7", "7", "duty")
    assert [hit.score for hit in hits] == pytest.approx(sorted(cosines, reverse=True)[:10], abs=3e-4)  # in half precision


@pytest.mark.usefixtures("small_steps")
def test_a_large_index_finds_nearly_all_that_an_exact_one_finds(tmp_path):
    index = PhraseIndex(tmp_path / "index", Numbers())
    everything = random_vectors(3000, 1)
    for start in range(0, 3000, 300):
        index.add(entries(range(start, start + 300)), everything[start : start + 300])
    queries = random_vectors(20, 2)
    found = [{hit.entry.id for hit in index.search_vector(query[None], 40)} for query in queries]
    exact = [{f"e{row}" for row in np.argsort(-(everything @ query))[:40]} for query in queries]
    assert np.mean([len(a & b) / 40 for a, b in zip(found, exact, strict=True)]) > 0.9  # random vectors have no clusters: the hardest case
    index.save()
    assert any(path.name.startswith("main-") for path in (tmp_path / "index").iterdir())


@pytest.mark.usefixtures("small_steps")
@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(1, 350), min_size=1, max_size=4), save=st.lists(st.booleans(), min_size=4, max_size=4))
def test_entries_added_in_steps_and_saved_or_not_are_all_found(tmp_path_factory, sizes, save):
    folder = tmp_path_factory.mktemp("index") / "index"
    index, n = PhraseIndex(folder, Numbers()), 0
    for size, saved in zip(sizes, save, strict=False):
        index.add(entries(range(n, n + size)))
        n += size
        if saved:
            index.save()
            index = PhraseIndex(folder, Numbers())
        assert len(index) == n
        for number in {0, n // 2, n - 1}:
            assert index.search(str(number), 1)[0].entry == entries([number])[0]


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("n", [100, 900])
def test_a_family_filter_finds_the_nearest_of_that_family_however_rare(tmp_path, n):
    index = PhraseIndex(tmp_path / "index", Numbers())
    index.add([Entry(f"e{number}", str(number), "rare" if number % 90 == 0 else "common") for number in range(n)])
    index.save()
    index.add([Entry("late", str(n), "rare")])
    rare = [*range(0, n, 90), n]
    cosines = Numbers().encode([str(number) for number in rare]) @ Numbers().encode(["7"])[0]
    hits = PhraseIndex.search(index, "7", 5, family="rare")
    expected = [str(rare[place]) for place in np.argsort(-cosines)[:5]]
    assert [hit.entry.text for hit in hits] == expected
    assert {hit.entry.family for hit in hits} == {"rare"}
    assert index.search("7", 5, family="unheard of") == []


@pytest.mark.usefixtures("small_steps")
def test_saving_and_opening_is_identity(tmp_path):
    index = PhraseIndex(tmp_path / "index", Numbers())
    index.add(entries(range(450)))
    index.save()
    opened = PhraseIndex(tmp_path / "index", Numbers())
    assert len(opened) == 450
    assert opened.search("3", 20) == index.search("3", 20)
    opened.add(entries(range(450, 460)))
    opened.save()
    assert PhraseIndex(tmp_path / "index", Numbers()).search("455", 1)[0].entry.id == "e455"
    assert len(list((tmp_path / "index").glob("*.faiss"))) == 2


def test_what_was_not_saved_is_gone_and_what_was_stays(tmp_path):
    index = PhraseIndex(tmp_path / "index", Numbers())
    index.add(entries(range(5)))
    index.save()
    index.add(entries(range(5, 9)))
    assert len(PhraseIndex(tmp_path / "index", Numbers())) == 5
    assert PhraseIndex(tmp_path / "nowhere", Numbers()).search("1") == []


def test_an_id_can_be_taken_once_only(tmp_path):
    index = PhraseIndex(tmp_path / "index", Numbers())
    index.add(entries(range(5)))
    for again in (entries([4]), [*entries([7]), *entries([7])]):
        with pytest.raises(InputError, match="an id of its own"):
            index.add(again)
    index.save()
    with pytest.raises(InputError, match="an id of its own"):
        PhraseIndex(tmp_path / "index", Numbers()).add(entries([4]))
    with pytest.raises(InputError, match="1 entries, but 2 vectors"):
        index.add(entries([9]), random_vectors(2, 0))
    assert len(index) == 5


def test_a_second_process_that_adds_does_not_overwrite_the_first(tmp_path):
    first, second = PhraseIndex(tmp_path / "index", Numbers()), PhraseIndex(tmp_path / "index", Numbers())
    first.add(entries(range(5)))
    second.add(entries(range(5, 9)))
    first.save()
    with pytest.raises(StoreError, match="Another process has saved"):
        second.save()
    assert len(PhraseIndex(tmp_path / "index", Numbers())) == 5


def test_an_index_of_another_encoder_is_refused(tmp_path):
    class Other(Numbers):
        fingerprint = "other"

    index = PhraseIndex(tmp_path / "index", Numbers())
    index.add(entries(range(5)))
    index.save()
    with pytest.raises(StoreError, match="another encoder"):
        PhraseIndex(tmp_path / "index", Other())


@pytest.mark.parametrize("file", ["tail-1.faiss", "entries.sqlite"])
def test_a_damaged_index_is_refused_with_the_remedy(tmp_path, file):
    index = PhraseIndex(tmp_path / "index", Numbers())
    index.add(entries(range(50)))
    index.save()
    path = tmp_path / "index" / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match="Restore the folder"):
        PhraseIndex(tmp_path / "index", Numbers())


SAVES_FOR_EVER = """
import os, sys
sys.path.insert(0, {tests!r})
from test_phrase_index import Numbers, entries
from vispa_graph.taxonomy_index import PhraseIndex, phrase_index, vectors
from pathlib import Path
import faiss
phrase_index.EXACT_UP_TO = vectors.EXACT_UP_TO = 200
for _ in sys.stdin:
    child = os.fork()  # importing again for each would take seconds
    if child == 0:
        print("started", os.getpid(), flush=True)
        index = PhraseIndex(Path({folder!r}), Numbers())
        while True:
            index.add(entries(range(len(index), len(index) + 70)))
            index.save()
            print("saved", len(index), flush=True)
    os.waitpid(child, 0)
    print("gone", 0, flush=True)
"""


def test_an_index_whose_save_is_killed_at_any_moment_holds_what_was_saved_before_or_after(tmp_path):
    folder = tmp_path / "index"
    code = SAVES_FOR_EVER.format(tests=str(Path(__file__).parent), folder=str(folder))
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a fork keeps no other
    environment = os.environ | one_thread | {"PYTHONPATH": str(Path(vispa_graph.__file__).parents[1])}
    random, told = np.random.default_rng(0), 0
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1, "env": environment}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as parent:
        for turn in range(10):
            parent.stdin.write("again\n")
            child = int(parent.stdout.readline().split()[1])
            if turn:  # the first may be killed while the folder is made
                told = int(parent.stdout.readline().split()[1])
            time.sleep(random.uniform(0, 0.25))
            os.kill(child, signal.SIGKILL)
            for line in parent.stdout:
                what, number = line.split()
                if what == "gone":
                    break
                told = int(number)
            index = PhraseIndex(folder, Numbers())
            assert len(index) in (told, told + 70)
            told = len(index)
            for number in {0, told // 2, told - 1} if told else ():
                assert index.search(str(number), 1)[0].entry == entries([number])[0]
            assert not told or index.search(str(told), 1)[0].score < 0.9999
        parent.stdin.close()
    assert told >= 9 * 70


@pytest.mark.parametrize("moment", range(6))
def test_a_save_killed_between_any_two_steps_leaves_the_index_readable(tmp_path, monkeypatch, moment):
    """Every step of a save, up to its commit, undone by an exception that nothing handles."""
    index = PhraseIndex(tmp_path / "index", Numbers())
    index.add(entries(range(50)))
    index.save()
    index.add(entries(range(50, 60)))
    steps = iter(range(100))

    class Killed(BaseException):
        pass

    real = phrase_index._connect

    class Database:
        def __init__(self, folder):
            self.real = real(folder)

        def __getattr__(self, name):
            if name != "close" and next(steps) == moment:
                raise Killed
            return getattr(self.real, name)

    monkeypatch.setattr(phrase_index, "_connect", Database)
    with pytest.raises(Killed):
        index.save()
    monkeypatch.setattr(phrase_index, "_connect", real)
    opened = PhraseIndex(tmp_path / "index", Numbers())
    assert len(opened) == 50
    opened.add(entries(range(50, 60)))
    opened.save()
    assert len(PhraseIndex(tmp_path / "index", Numbers())) == 60
