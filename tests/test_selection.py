"""How phrases near a query vote for the values at stake."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vispa_graph import create_graph, select_values
from vispa_graph.engine.huggingface import HuggingFaceEngine
from vispa_graph.errors import EmptyQueryError, SelectionSizeError
from vispa_graph.settings import Settings
from vispa_graph.taxonomy_index import Hit, Phrase, rank
from vispa_graph.taxonomy_index.retriever import TaxonomyRetriever, ValueReranker

FATHER = "Should my father, 84, have an operation he does not want?"
VALUES = ["karma", "honor", "face", "power"]

cosines = st.floats(-1, 1)
value_ids = st.sampled_from(VALUES)
own_hits = st.builds(
    lambda value, kind, score: Hit(Phrase(f"a {kind} of {value}", kind, value, {value: 1.0}), score),
    value_ids,
    st.sampled_from(["definition", "facet"]),
    cosines,
)
concern_hits = st.builds(
    lambda weights, score: Hit(Phrase("a kind of situation", "concern", "one", weights), score),
    st.dictionaries(value_ids, st.sampled_from([0.5, 1.0]), min_size=1),
    cosines,
)
hit_lists = st.lists(own_hits | concern_hits, max_size=12)


@pytest.fixture
def resources(fake_resources):
    return fake_resources


@given(hit_lists)
def test_every_value_is_ranked_once_best_first_with_a_score_in_0_1_and_a_reason(hits):
    ranked = rank(hits, VALUES)
    assert sorted(s.value for s in ranked) == sorted(VALUES)
    assert all(0 <= s.score <= 1 and s.reason for s in ranked)
    assert [s.score for s in ranked] == sorted((s.score for s in ranked), reverse=True)


@given(hit_lists, st.permutations(VALUES))
def test_equal_scores_come_in_the_order_given(hits, values):
    ranked = rank(hits, values)
    for one, next_ in pairwise(ranked):
        assert one.score > next_.score or values.index(one.value) < values.index(next_.value)


@given(hit_lists, st.randoms(use_true_random=False))
def test_the_order_of_the_hits_decides_nothing(hits, random):
    shuffled = random.sample(hits, len(hits))
    before = {s.value: s.score for s in rank(hits, VALUES)}
    assert {s.value: s.score for s in rank(shuffled, VALUES)} == pytest.approx(before, abs=2e-4)


@given(hit_lists, value_ids)
def test_a_nearer_facet_never_lowers_a_value_s_score(hits, value):
    def score(extra):
        return next(s.score for s in rank([*hits, *extra], VALUES) if s.value == value)

    assert score([Hit(Phrase("another facet", "facet", value, {value: 1.0}), 1.0)]) >= score([])


def test_a_value_that_a_concern_calls_central_beats_one_that_it_calls_relevant():
    hit = Hit(Phrase("a sick father", "concern", "one", {"honor": 0.5, "face": 1.0}), 0.6)
    ranked = rank([hit], VALUES)
    assert [s.value for s in ranked[:2]] == ["face", "honor"]
    assert ranked[0].score == 2 * ranked[1].score > ranked[2].score == 0
    assert ranked[0].reason == 'like "a sick father"'


def test_the_nearest_facet_is_the_reason_where_facets_speak_loudest():
    hits = [Hit(Phrase(text, "facet", "karma", {"karma": 1.0}), score) for text, score in (("far", 0.2), ("near", 0.9), ("nearer", 0.95))]
    assert rank(hits, VALUES)[0].reason == 'about "nearer"'


def test_a_question_about_refusing_an_operation_puts_self_direction_at_stake(resources):
    selected = select_values(FATHER, resources=resources)
    assert "self-direction" in [s.value for s in selected[:3]]
    assert len(selected) == 6


def test_fewer_values_are_the_first_of_more(resources):
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
        assert set(document.metadata) == {"score", "kind", "source", "values"}
    values = ValueReranker(index=resources.index, k=3).invoke(FATHER, candidates=candidates)
    assert len(values) == 3
    for document in values:
        assert document.page_content == resources.taxonomy[document.metadata["value"]].definition
        assert 0 <= document.metadata["score"] <= 1


def test_the_reranker_finds_its_own_candidates_where_it_is_given_none(resources):
    reranked = ValueReranker(index=resources.index, k=6).invoke(FATHER)
    assert [d.metadata["value"] for d in reranked] == [s.value for s in select_values(FATHER, resources=resources)]
