"""Telling people from values, rights and duties in the attribute of a steerable question."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vispa_graph.attributes import ATTRIBUTE, attribute_value, read_attribute
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.graph import create_graph
from vispa_graph.taxonomy_index.taxonomy import FORMS

QUERY = "May the doctor give blood?"
WITNESS = "a Jehovah's Witness"


@pytest.mark.parametrize(
    "text",
    [
        "a nurse",
        "An engineer",
        "the elderly",
        "people from Ghana",
        "Someone who fasts",
        "men over 60",
        "members of a union",
        "people with a duty to report",
    ],
)
def test_people_are_a_group(text):
    assert read_attribute(text).kind == "group"
    assert read_attribute(text).text == text


@pytest.mark.parametrize(
    "text",
    [
        "honesty",
        "Right to life",
        "Duty of care",
        "autonomy",
        "menace avoidance",
        "the right to refuse treatment",
        "a duty to tell the truth",
        "the value of life",
    ],
)
def test_values_rights_and_duties_are_not_a_group(text):
    assert read_attribute(text).kind == "vrd"
    assert read_attribute(text).text == text


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("POLPARTY_Democrat", "political party: Democrat"),
        ("POLIDEOLOGY_Very conservative", "political ideology: Very conservative"),
        ("RELIG_Roman Catholic", "religion: Roman Catholic"),
        ("RACE_Asian", "race: Asian"),
        ("EDUCATION_College graduate/some postgrad", "education: College graduate/some postgrad"),
        ("INCOME_$100,000 or more", "income: $100,000 or more"),
        ("CREGION_South", "region in the United States: South"),
        ("SEX_Female", "sex: Female"),
    ],
)
def test_opinionqa_codes_are_spelt_out_as_groups(code, text):
    assert read_attribute(code).kind == "group"
    assert read_attribute(code).text == text


@pytest.mark.parametrize("text", ["SEX_", "SHOE_Size", "_"])
def test_what_only_looks_like_a_code_is_left_alone(text):
    assert read_attribute(text).text == text


# As a direction


@pytest.mark.parametrize(
    ("text", "noun"),
    [
        (WITNESS, WITNESS),
        ("the elderly", "one of the elderly"),
        ("people from Ghana", "one of people from Ghana"),
        ("POLPARTY_Democrat", "someone whose political party is Democrat"),
        ("the right to refuse treatment", "the right to refuse treatment"),
    ],
)
def test_an_attribute_stands_in_every_positive_twin_as_a_noun(text, noun):
    value = attribute_value(text)
    assert set(value.pairs) == set(FORMS)
    assert len({len(twins) for twins in value.pairs.values()}) == 1
    assert len(value.all_pairs) >= 25
    for pair in value.all_pairs:
        assert noun.lower() in pair.positive.lower()
        assert pair.positive != pair.negative
        assert pair.positive[0].isupper()


def test_nobody_of_a_group_is_named_in_the_negative_twins():
    assert not any("witness" in pair.negative.lower() for pair in attribute_value(WITNESS).all_pairs)


@given(st.text(min_size=1).filter(str.strip))
def test_whatever_an_attribute_says_it_is_never_a_template(text):
    for pair in attribute_value("a " + text + "{attribute}{0}").all_pairs:
        assert text + "{attribute}{0}" in pair.positive


class Witnessing(FakeEngine):
    """A model in which only sentences about witnesses have something in common."""

    def read(self, conversations, progress=None):
        self.read_texts = [*getattr(self, "read_texts", []), *conversations]
        states = super().read(conversations, progress)
        return states + np.array([[[6.0]] if "itness" in str(c) else [[0.0]] for c in conversations], dtype=np.float32)


def invoke(resources, attribute, **given):
    return create_graph(resources=resources).invoke({"query": QUERY, "attribute": attribute, "values": ["karma"], **given})


def test_an_attribute_outside_the_taxonomy_is_heard_first_and_answered_from_its_own_direction(make_resources):
    engine = Witnessing()
    out = invoke(make_resources(engine=engine, aggregation="compose"), WITNESS)
    assert [c["value"] for c in out["comments"]] == [ATTRIBUTE, "karma"]
    assert out["comments"][0]["name"] == out["values"][0]["name"] == WITNESS
    assert out["chosen"] == {"value": ATTRIBUTE, "reason": "made by steering toward the attribute itself"}
    assert out["response"] == out["comments"][0]["text"]
    steered = [request.steering.direction for request in engine.requests if request.steering]
    assert {direction.value for direction in steered} == {ATTRIBUTE, "karma"}


def test_a_note_says_that_it_was_fitted_and_how_well_it_separates(make_resources):
    resources = make_resources(engine=Witnessing(), aggregation="compose")
    notes = invoke(resources, WITNESS)["notes"]
    held_out = resources.attribute_steering(WITNESS).direction.held_out.mean()
    assert any("fitted on 32 pairs made from templates" in note and f"tells {held_out:.0%} of the sentences held out" in note for note in notes)
    assert held_out > 0.9


def test_an_attribute_that_does_not_separate_is_said_so_and_its_comment_is_not_chosen(make_resources):
    out = invoke(make_resources(engine=FakeEngine(), aggregation="compose"), "a nurse")
    assert any("too little for an answer to rest on" in note for note in out["notes"])
    assert out["chosen"]["value"] == "karma"


def test_it_is_fitted_once_and_found_in_the_cache_by_later_runs(make_resources, tmp_path):
    first, later = Witnessing(), Witnessing()
    for engine in (first, later):
        resources = make_resources(engine=engine, cache=tmp_path, aggregation="compose")
        notes = [invoke(resources, WITNESS)["notes"] for _ in range(2)]
        assert notes[0] == notes[1]
    assert sum("Jehovah" in text for text in first.read_texts) == 32
    assert not any("Jehovah" in text for text in getattr(later, "read_texts", []))


def test_asked_for_by_many_threads_at_once_it_is_fitted_once(make_resources, tmp_path):
    class Slow(Witnessing):
        def read(self, conversations, progress=None):
            time.sleep(0.1)
            return super().read(conversations, progress)

    engine = Slow()
    resources = make_resources(engine=engine, cache=tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(resources.attribute_steering, [WITNESS] * 4))
    assert len(engine.read_texts) == 64


def test_the_cache_does_not_hold_the_attribute_in_words(make_resources, tmp_path):
    invoke(make_resources(engine=Witnessing(), cache=tmp_path, aggregation="compose"), WITNESS)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not any(b"itness" in path.read_bytes() for path in files)


def test_its_twins_are_its_only_negatives_whatever_the_contrast_of_the_values(make_resources, tmp_path):
    engine = Witnessing()
    resources = make_resources(engine=engine, cache=tmp_path, contrast="opposed+others")
    resources.attribute_steering(WITNESS)
    assert len(engine.read_texts) == 64


@pytest.mark.parametrize("settings", [{"fit_attributes": False}, {"strength": 0}])
def test_it_can_be_left_to_the_choice_among_the_values_comments(make_resources, settings):
    out = invoke(make_resources(engine=Witnessing(), aggregation="compose", **settings), WITNESS)
    assert [c["value"] for c in out["comments"]] == ["karma"]
    assert out["chosen"]["value"] == "karma"


def test_an_attribute_that_names_a_value_is_not_fitted_again(make_resources, tmp_path):
    engine = Witnessing()
    out = invoke(make_resources(engine=engine, cache=tmp_path, aggregation="compose"), "Honor")
    assert out["chosen"]["value"] == "honor"
    assert not any("Honor" in text and "speak" in text for text in engine.read_texts)


def test_in_review_it_can_be_kept_or_struck_out(make_resources):
    from langgraph.checkpoint.memory import InMemorySaver
    from langgraph.types import Command

    for kept in ([ATTRIBUTE, "honor"], ["honor"]):
        resources = make_resources(engine=Witnessing(), aggregation="compose")
        graph = create_graph(resources=resources, checkpointer=InMemorySaver(), review=True)
        thread = {"configurable": {"thread_id": "1"}}
        graph.invoke({"query": QUERY, "attribute": WITNESS, "values": ["karma"]}, thread)
        out = graph.invoke(Command(resume=kept), thread)
        assert [c["value"] for c in out["comments"]] == kept
        assert out["chosen"]["value"] == kept[0]
