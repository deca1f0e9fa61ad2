"""How phrases near a query vote for the values at stake."""

from __future__ import annotations

import logging
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vispa_graph import create_graph, select_values
from vispa_graph.engine.huggingface import HuggingFaceEngine
from vispa_graph.errors import EmptyQueryError, SelectionSizeError
from vispa_graph.settings import Settings
from vispa_graph.taxonomy_index import Hit, Phrase
from vispa_graph.taxonomy_index.retriever import TaxonomyRetriever, ValueReranker
from vispa_graph.taxonomy_index.selection import Selected, choose, shares, vote

FATHER = "Should my father, 84, have an operation he does not want?"
VALUES = ["karma", "honor", "face", "power"]

# Hits on an index of six phrases, and how those phrases pull.
PULL = np.array([[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 0, 1], [0.5, 0, 0.5, 0], [0, 0, 0, 0]], dtype=np.float32)
PHRASES = [Phrase(f"phrase {row}", "concern", f"c{row}", {v: float(p) for v, p in zip(VALUES, PULL[row], strict=True) if p}) for row in range(6)]
hit_lists = st.lists(st.tuples(st.integers(0, 5), st.floats(-1, 1)), max_size=6, unique_by=lambda hit: hit[0]).map(
    lambda found: [Hit(PHRASES[row], score, row) for row, score in found]
)


@pytest.fixture
def resources(fake_resources):
    return fake_resources


@given(hit_lists)
def test_every_value_is_ranked_once_best_first_with_a_score_in_0_1_and_a_reason(hits):
    ranked = vote(hits, PULL, VALUES)
    assert sorted(s.value for s in ranked) == sorted(VALUES)
    assert all(0 <= s.score <= 1 and s.reason for s in ranked)
    assert [s.score for s in ranked] == sorted((s.score for s in ranked), reverse=True)


@given(hit_lists, st.permutations(range(4)))
def test_equal_scores_come_in_the_order_given(hits, order):
    values = [VALUES[column] for column in order]
    ranked = vote(hits, PULL[:, list(order)], values)
    evidence = dict(zip(values, shares(hits, PULL[:, list(order)]).sum(axis=0).clip(0).round(5), strict=True)) if hits else dict.fromkeys(values, 0.0)
    for one, next_ in pairwise(ranked):
        assert evidence[one.value] > evidence[next_.value] or values.index(one.value) < values.index(next_.value)


@given(hit_lists, st.randoms(use_true_random=False))
def test_the_order_of_the_hits_decides_nothing(hits, random):
    shuffled = random.sample(hits, len(hits))
    before = {s.value: s.score for s in vote(hits, PULL, VALUES)}
    assert {s.value: s.score for s in vote(shuffled, PULL, VALUES)} == pytest.approx(before, abs=2e-3)


def test_a_value_that_a_phrase_pulls_more_comes_first_with_the_phrase_as_its_reason():
    ranked = vote([Hit(PHRASES[0], 0.8, 0)], PULL, VALUES)
    assert [s.value for s in ranked[:2]] == ["karma", "honor"]
    assert ranked[0].score > ranked[1].score > ranked[2].score
    assert ranked[0].reason == 'like "phrase 0"'
    assert ranked[2].reason == "no phrase near the query points at it"


RANKED = [Selected("a", 0.9, "-"), Selected("b", 0.8, "-"), Selected("c", 0.5, "-"), Selected("d", 0.05, "-")]


def test_at_most_k_values_of_at_least_the_lowest_score_are_chosen():
    assert [s.value for s in choose(RANKED, 2)] == ["a", "b"]
    assert [s.value for s in choose(RANKED, 4, min_score=0.1)] == ["a", "b", "c"]
    assert choose(RANKED, 4, min_score=0.95) == []


def test_diversity_prefers_a_value_unlike_those_chosen_before():
    likeness = np.eye(4, dtype=np.float32)
    likeness[0, 1] = likeness[1, 0] = 1.0
    assert [s.value for s in choose(RANKED, 2, diversity=0.5, likeness=likeness)] == ["a", "c"]
    assert [s.value for s in choose(RANKED, 2, diversity=0.0, likeness=likeness)] == ["a", "b"]


def test_a_question_about_refusing_an_operation_puts_self_direction_at_stake(resources):
    selected = select_values(FATHER, resources=resources)
    assert "self-direction" in [s.value for s in selected[:3]]
    assert len(selected) == 6


def test_fewer_values_are_the_first_of_more(make_resources):
    resources = make_resources(min_score=0)
    every = select_values(FATHER, k=31, resources=resources)
    assert len({s.value for s in every}) == 31
    for k in (1, 6):
        assert select_values(FATHER, k=k, resources=resources) == every[:k]


def test_the_same_query_gives_the_same_selection_from_another_instance(resources, make_resources):
    assert select_values(FATHER, resources=make_resources()) == select_values(FATHER, resources=resources)


def test_settings_alone_are_enough_and_no_language_model_is_loaded(monkeypatch, resources):
    def load(*args, **kwargs):
        raise RuntimeError("a language model was loaded")

    monkeypatch.setattr(HuggingFaceEngine, "load", load)
    assert select_values(FATHER, k=2, settings=Settings()) == select_values(FATHER, k=2, resources=resources)


def test_a_text_beyond_the_encoder_s_window_is_noted_without_a_warning_of_the_model_library(fake_graph, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    notes = fake_graph.invoke({"query": f"{FATHER} " * 60})["notes"]
    assert notes == ["The text is longer than the sentence encoder reads, so the values were selected by its beginning."]
    assert "Token indices" not in caplog.text


@pytest.mark.parametrize("query", ["", "  \n"])
def test_a_blank_query_is_refused(query):
    with pytest.raises(EmptyQueryError, match="Give a question or a situation"):
        select_values(query)


@pytest.mark.parametrize("k", [0, -1, 32])
def test_k_must_be_between_one_and_the_number_of_values(resources, k):
    with pytest.raises(SelectionSizeError, match=f"k is {k}, but must be 1 to 31"):
        select_values(FATHER, k=k, resources=resources)


def test_settings_that_ask_for_more_values_than_there_are_are_refused_before_anything_is_loaded(taxonomy, encoder):
    with pytest.raises(SelectionSizeError, match="top_k is 32, but the taxonomy holds 31"):
        create_graph(Settings(top_k=32), encoder=encoder, taxonomy=taxonomy)


def test_the_retrievers_show_each_step_as_documents_with_scores(resources):
    candidates = TaxonomyRetriever(index=resources.index, n=20).invoke(FATHER)
    assert len(candidates) == 20
    for document in candidates:
        assert set(document.metadata) == {"score", "kind", "source", "values", "row"}
    values = ValueReranker(index=resources.index, selector=resources.selector, k=3).invoke(FATHER, candidates=candidates)
    assert len(values) == 3
    for document in values:
        assert document.page_content == resources.taxonomy[document.metadata["value"]].definition
        assert 0 <= document.metadata["score"] <= 1


def test_the_reranker_finds_its_own_candidates_where_it_is_given_none(resources):
    reranked = ValueReranker(index=resources.index, selector=resources.selector, k=6).invoke(FATHER)
    assert [d.metadata["value"] for d in reranked] == [s.value for s in select_values(FATHER, resources=resources)]


@st.composite
def ranked_values(draw):
    """Values with scores, best first, and how like they are."""
    scores = sorted(draw(st.lists(st.floats(0, 1), min_size=1, max_size=8)), reverse=True)
    n = len(scores)
    cells = np.array(draw(st.lists(st.floats(0, 1), min_size=n * n, max_size=n * n)), dtype=np.float32).reshape(n, n)
    return [Selected(f"v{place}", score, "-") for place, score in enumerate(scores)], (cells + cells.T) / 2


@given(ranked_values(), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
def test_whatever_the_diversity_k_values_of_at_least_the_lowest_score_are_chosen_once_each(found, k, min_score, diversity):
    ranked, likeness = found
    allowed = [s for s in ranked if s.score >= min_score]
    chosen = choose(ranked, k, min_score=min_score, diversity=diversity, likeness=likeness)
    assert len(chosen) == min(k, len(allowed))
    assert len({s.value for s in chosen}) == len(chosen)
    assert all(s in allowed for s in chosen)
    assert choose(ranked, k, min_score=min_score, diversity=0, likeness=likeness) == allowed[:k]


@given(ranked_values(), st.integers(1, 8), st.floats(0, 0.99))
def test_the_best_value_comes_first_whatever_the_diversity_and_fewer_are_the_first_of_more(found, k, diversity):
    ranked, likeness = found
    chosen = choose(ranked, k, diversity=diversity, likeness=likeness)
    assert chosen[0].score == ranked[0].score
    assert choose(ranked, 8, diversity=diversity, likeness=likeness)[:k] == chosen


def test_how_like_two_values_are_is_between_0_and_1_symmetric_and_1_for_the_same(resources):
    likeness = resources.index.likeness(resources.taxonomy.ids)
    assert likeness.shape == (31, 31)
    assert likeness.min() >= 0
    assert likeness.max() <= 1
    assert likeness == pytest.approx(likeness.T)
    assert likeness.diagonal() == pytest.approx(np.ones(31), abs=1e-5)
