"""Answers composed of the comments' own sentences: nobody is left out, nothing is made up."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vispa_graph.composing import attribute_sentences, nearest_comment, split_sentences, telling_sentences

QUERY = "Should my father, 84, have an operation he does not want?"
VALUES = ["self-direction", "security", "karma", "honor"]
WORDS = ["he", "decides", "himself", "safety", "first", "deeds", "return", "honor", "binds", "us"]

sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(lambda words: " ".join(words).capitalize() + ".")
texts = st.lists(sentences, max_size=3).map(" ".join)


def comment(value, text, finish="stop"):
    return {"value": value, "name": value, "text": text, "finish": finish, "tokens": 1, "cut_tokens": 0, "steering": None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  \n ", []),
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("First line\nSecond line. And more.", ["First line", "Second line.", "And more."]),
        ("It costs 3.5 euros, e.g. for two.", ["It costs 3.5 euros, e.g. for two."]),
        ('He said "go." Then he left.', ['He said "go."', "Then he left."]),
        ('(She stayed.) "Why?" asked Ana.', ["(She stayed.)", '"Why?" asked Ana.']),
        ("Done.) 'Next' it said.", ["Done.)", "'Next' it said."]),
    ],
)
def test_texts_are_split_where_sentences_end(text, expected):
    assert split_sentences(text) == expected


@given(st.text(st.sampled_from("aB. !?\"'()\n1"), max_size=40) | st.text(max_size=40))
def test_splitting_loses_nothing_but_blanks(text):
    found = split_sentences(text)
    assert re.sub(r"\s", "", "".join(found)) == re.sub(r"\s", "", text)
    assert all(sentence and sentence == sentence.strip() for sentence in found)


@settings(max_examples=40)
@given(st.lists(texts, min_size=len(VALUES), max_size=len(VALUES)))
def test_every_value_with_a_text_is_heard_exactly_once_in_its_own_words(taxonomy, word_encoder, texts):
    comments = [comment(value, text) for value, text in zip(VALUES, texts, strict=True)]
    told = telling_sentences(QUERY, comments, taxonomy, word_encoder)
    heard = [value for attribution in told for value in attribution["values"]]
    assert sorted(heard) == sorted(c["value"] for c in comments if c["text"])
    for attribution in told:
        spoken = next(c["text"] for c in comments if c["value"] == attribution["values"][0])
        assert attribution["sentence"] in split_sentences(spoken)


@settings(max_examples=40)
@given(st.lists(texts.filter(bool), min_size=len(VALUES), max_size=len(VALUES)))
def test_views_come_in_the_order_of_the_comments(taxonomy, word_encoder, texts):
    told = telling_sentences(QUERY, [comment(value, text) for value, text in zip(VALUES, texts, strict=True)], taxonomy, word_encoder)
    first = [VALUES.index(attribution["values"][0]) for attribution in told]
    assert first == sorted(first)


def test_the_sentence_nearest_to_its_value_is_told(taxonomy, encoder):
    text = "The weather is mild. He alone may decide about his own body. Coffee is served at noon."
    told = telling_sentences(QUERY, [comment("self-direction", text), comment("security", "Surgery keeps him safe.")], taxonomy, encoder)
    assert told[0] == {"sentence": "He alone may decide about his own body.", "values": ["self-direction"]}


def test_comments_that_say_the_same_are_told_once_with_both_values(taxonomy, encoder):
    comments = [
        comment("self-direction", "He alone may decide about his operation."),
        comment("karma", "What one does comes back in time."),
        comment("individualism", "He alone may decide about his own operation."),
    ]
    told = telling_sentences(QUERY, comments, taxonomy, encoder)
    assert [a["values"] for a in told] == [["self-direction", "individualism"], ["karma"]]
    assert told[0]["sentence"] == comments[0]["text"]


def test_a_last_sentence_that_was_cut_off_is_not_told(taxonomy, encoder):
    text = "Tea is served. He alone may decide about his own body and his own operation because"
    told = telling_sentences(QUERY, [comment("self-direction", text, "length")], taxonomy, encoder)
    assert told == [{"sentence": "Tea is served.", "values": ["self-direction"]}]


def test_unless_there_is_nothing_else(taxonomy, encoder):
    told = telling_sentences(QUERY, [comment("self-direction", "He alone may", "length")], taxonomy, encoder)
    assert told == [{"sentence": "He alone may", "values": ["self-direction"]}]


def test_a_generated_sentence_is_attributed_to_the_comments_it_rests_on(encoder):
    comments = [
        comment("self-direction", "He alone may decide about his operation. Nobody else may."),
        comment("karma", "Good deeds come back to the one who does them."),
    ]
    response = "Only he may decide whether to have the operation. Good deeds are repaid. Bananas are yellow."
    found = attribute_sentences(response, comments, encoder)
    assert [a["sentence"] for a in found] == split_sentences(response)
    assert [a["values"] for a in found] == [["self-direction"], ["karma"], []]


@settings(max_examples=30)
@given(texts, st.lists(texts, max_size=6))
def test_attribution_covers_the_whole_response_and_names_three_values_at_most(word_encoder, response, texts):
    comments = [comment(f"value-{number}", text) for number, text in enumerate(texts)]
    found = attribute_sentences(response, comments, word_encoder)
    assert [a["sentence"] for a in found] == split_sentences(response)
    speaking = {c["value"] for c in comments if c["text"]}
    for attribution in found:
        assert len(set(attribution["values"])) == len(attribution["values"]) <= 3
        assert set(attribution["values"]) <= speaking


def test_a_sentence_taken_over_word_for_word_is_attributed_to_its_comment(word_encoder):
    comments = [comment("karma", "Deeds return."), comment("honor", "Safety first.")]
    assert attribute_sentences("Safety first.", comments, word_encoder) == [{"sentence": "Safety first.", "values": ["honor"]}]


def test_the_comment_nearest_to_an_attribute_is_the_one_that_speaks_of_it(taxonomy, encoder):
    comments = [
        comment("karma", "What one does comes back in time."),
        comment("self-direction", "A patient may refuse any treatment; it is his own choice."),
        comment("power", "Those in charge should decide."),
    ]
    assert nearest_comment("the right to refuse treatment", comments, taxonomy, encoder)["value"] == "self-direction"
    assert nearest_comment("the right to refuse treatment", comments[::-1], taxonomy, encoder)["value"] == "self-direction"
