"""The index is the same after a trip to disk, and one that is damaged or foreign is never used."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vispa_graph.errors import StoreError
from vispa_graph.taxonomy_index import Phrase, Taxonomy, TaxonomyIndex
from vispa_graph.taxonomy_index.encoder import Floats
from vispa_graph.taxonomy_index.index import phrases_of
from vispa_graph.taxonomy_index.vectors import ROUNDING, VectorIndex

QUERY = "May I refuse the operation my doctor wants?"


@pytest.fixture(scope="session")
def some_values(taxonomy):
    return taxonomy.subset(["self-direction", "benevolence", "karma"])


@pytest.fixture(scope="session")
def index(some_values, word_encoder):
    return TaxonomyIndex.build(some_values, word_encoder)


@pytest.fixture
def stored(index, tmp_path):
    index.save(tmp_path / "stored")
    return tmp_path / "stored"


def test_definitions_facets_and_concerns_point_at_their_values(some_values):
    phrases = phrases_of(some_values)
    value, concern = some_values["karma"], some_values.concerns[0]
    assert Phrase(value.definition, "definition", "karma", {"karma": 1.0}) in phrases
    assert Phrase(value.facets[0], "facet", "karma", {"karma": 1.0}) in phrases
    weights = dict.fromkeys(concern.relevant, 0.5) | dict.fromkeys(concern.central, 1.0)
    assert Phrase(concern.phrasings[0], "concern", concern.id, weights) in phrases
    kinds = Counter(phrase.kind for phrase in phrases)
    assert kinds["definition"] == len(some_values)
    assert kinds["facet"] == sum(len(value.facets) for value in some_values)
    assert kinds["concern"] == sum(len(concern.phrasings) for concern in some_values.concerns)


def test_every_phrase_is_nearest_to_itself(index):
    for phrase in index.phrases[::7]:
        best = index.search(phrase.text, 1)[0]
        assert best.score == pytest.approx(1, abs=2 * ROUNDING)


def test_search_gives_the_best_first_and_no_more_than_there_are(index):
    hits = index.search(QUERY, 10_000)
    assert len(hits) == len(index.phrases)
    assert all(-1 <= hit.score <= 1.0001 for hit in hits)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert [hit.score for hit in index.search(QUERY, 5)] == [hit.score for hit in hits[:5]]


@settings(max_examples=25)
@given(st.text(max_size=40))
def test_equal_scores_come_in_the_order_of_the_taxonomy(index, query):
    place = {id(phrase): row for row, phrase in enumerate(index.phrases)}
    hits = index.search(query, 10_000)
    ranked = [(-hit.score, place[id(hit.phrase)]) for hit in hits]
    assert ranked == sorted(ranked)


def test_saving_and_loading_is_identity(index, stored, some_values, word_encoder):
    loaded = TaxonomyIndex.load(some_values, word_encoder, stored)
    assert loaded.phrases == index.phrases
    assert loaded.search(QUERY, 10_000) == index.search(QUERY, 10_000)


def test_an_index_on_disk_holds_no_pickle_and_no_more_than_index_weights_and_manifest(stored):
    assert {path.name for path in stored.iterdir()} == {"index.faiss", "manifest.json", "weights.safetensors"}
    assert json.loads((stored / "manifest.json").read_text())["phrases"] > 0


def test_another_taxonomy_or_encoder_is_refused(stored, some_values, word_encoder):
    class Other:
        fingerprint = "other"
        encode = word_encoder.encode

    changed = Taxonomy([replace(value, definition="Changed.") for value in some_values], some_values.concerns)
    with pytest.raises(StoreError, match="belongs to another taxonomy"):
        TaxonomyIndex.load(changed, word_encoder, stored)
    with pytest.raises(StoreError, match="belongs to another encoder"):
        TaxonomyIndex.load(some_values, Other(), stored)


def flip_a_byte(folder):
    content = bytearray((folder / "index.faiss").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "index.faiss").write_bytes(content)


def cut_short(folder):
    (folder / "index.faiss").write_bytes((folder / "index.faiss").read_bytes()[:-100])


def cut_the_manifest_short(folder):
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-20])


def write_another_manifest(folder):
    (folder / "manifest.json").write_text("[1, 2]")


def lose_the_index(folder):
    (folder / "index.faiss").unlink()


def lose_everything(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def come_from_a_later_version(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


@pytest.mark.parametrize(
    "damage",
    [flip_a_byte, cut_short, cut_the_manifest_short, write_another_manifest, lose_the_index, lose_everything, come_from_a_later_version],
)
def test_a_damaged_index_is_refused_with_the_remedy(stored, some_values, word_encoder, damage):
    damage(stored)
    with pytest.raises(StoreError, match=r"Remove the folder .*stored and it is built again\."):
        TaxonomyIndex.load(some_values, word_encoder, stored)


def test_an_index_of_another_size_is_refused_even_with_a_matching_checksum(index, some_values, word_encoder, tmp_path):
    small = TaxonomyIndex.build(some_values.subset(["karma"]), word_encoder)
    TaxonomyIndex(some_values, word_encoder, small._index, index.pull, index.centroids).save(tmp_path / "small")
    with pytest.raises(StoreError, match=r"phrases, not the taxonomy's"):
        TaxonomyIndex.load(some_values, word_encoder, tmp_path / "small")


def test_a_save_that_fails_leaves_nothing_behind(index, tmp_path, monkeypatch):
    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space") as raised:
        index.save(tmp_path / "index")
    assert raised.value.filename == str(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="modes of files are of Unix")
def test_an_index_can_be_read_by_whoever_may_read_what_the_process_writes(index, tmp_path):
    index.save(tmp_path / "index")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").write_text("")
    assert (tmp_path / "index").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "index").iterdir()} == {(tmp_path / "plain" / "file").stat().st_mode}


def test_a_folder_that_another_process_put_there_first_stays(index, stored, some_values, word_encoder):
    before = {path.name: path.read_bytes() for path in stored.iterdir()}
    index.save(stored)
    assert {path.name: path.read_bytes() for path in stored.iterdir()} == before
    assert [path.name for path in stored.parent.iterdir()] == ["stored"]
    TaxonomyIndex.load(some_values, word_encoder, stored)


def test_the_second_time_an_index_is_opened_its_phrases_are_not_encoded_again(some_values, word_encoder, tmp_path):
    first = TaxonomyIndex.open(some_values, word_encoder, tmp_path)
    assert len(word_encoder.encoded) >= len(first.phrases)
    word_encoder.encoded.clear()
    second = TaxonomyIndex.open(some_values, word_encoder, tmp_path)
    assert word_encoder.encoded == []
    assert second.search(QUERY, 20) == first.search(QUERY, 20)


def test_a_changed_taxonomy_gets_an_index_of_its_own_beside_the_old_one(some_values, word_encoder, tmp_path):
    TaxonomyIndex.open(some_values, word_encoder, tmp_path)
    changed = Taxonomy([replace(value, facets=("something else",)) for value in some_values], some_values.concerns)
    assert TaxonomyIndex.open(changed, word_encoder, tmp_path).search("something else", 3)[0].phrase.text == "something else"
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_a_damaged_cache_is_refused_not_used(some_values, word_encoder, tmp_path):
    TaxonomyIndex.open(some_values, word_encoder, tmp_path)
    flip_a_byte(next((tmp_path / "index").iterdir()))
    with pytest.raises(StoreError, match="damaged"):
        TaxonomyIndex.open(some_values, word_encoder, tmp_path)


def unit_vectors(count: int, dimensions: int, seed: int) -> Floats:
    vectors = np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@given(st.integers(2, 60), st.integers(1, 400), st.integers(0, 2**16))
def test_rounded_vectors_are_found_by_nearly_their_cosines(count, dimensions, seed):
    vectors = unit_vectors(count, dimensions, seed)
    scores, rows = VectorIndex.build(vectors).search(vectors[:1], count)
    exact = vectors @ vectors[0]
    assert sorted(rows[0]) == list(range(count))
    assert np.abs(exact[rows[0]] - scores[0]).max() < 2 * ROUNDING
    assert np.abs(scores).max() <= 1


def test_vectors_like_those_of_minilm_are_rounded_to_bytes_and_a_cosine_moves_by_some_thousandths():
    vectors = unit_vectors(500, 384, 0)
    index = VectorIndex.build(vectors)
    assert index.scale > 127
    scores, rows = index.search(vectors[:1], 500)
    assert np.abs((vectors @ vectors[0])[rows[0]] - scores[0]).max() < 4e-3


def test_a_query_of_its_own_is_compared_like_an_indexed_one():
    vectors, queries = unit_vectors(500, 384, 0), unit_vectors(20, 384, 1)
    index = VectorIndex.build(vectors)
    for query in queries:
        scores, rows = index.search(query[None], 500)
        assert np.abs((vectors @ query)[rows[0]] - scores[0]).max() < 4e-3


def test_vectors_with_one_large_component_are_not_rounded_to_bytes():
    vectors = unit_vectors(50, 384, 0)
    vectors[0] = np.eye(384)[0]
    index = VectorIndex.build(vectors)
    scores, rows = index.search(vectors[1:2], 50)
    assert index.scale == 0
    assert np.abs((vectors @ vectors[1])[rows[0]] - scores[0]).max() < 5e-4
