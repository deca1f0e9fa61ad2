"""A probability for every option: read from the model, or openly left out, never made up."""

from __future__ import annotations

import math
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models import FakeListChatModel
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage

from vispa_graph.engine.contract import Scores
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.errors import AggregationError
from vispa_graph.graph import create_graph
from vispa_graph.nodes.distributional import in_words
from vispa_graph.scoring import option_prompt, score_by_chat, score_locally
from vispa_graph.state import LETTERS

QUERY = "Should he have the operation?"
OPTIONS = ["Yes", "No", "Unsure"]
COMMENTS = [{"value": "karma", "name": "Karma", "text": "Deeds return."}, {"value": "honor", "name": "Honor", "text": "Keep your word."}]


def answers(*texts):
    return score_by_chat(FakeListChatModel(responses=list(texts)), ["prompt"] * len(texts), COMMENTS[: len(texts)], len(OPTIONS), {})


def with_logprobs(top, text="?"):
    tokens = [{"token": token, "logprob": math.log(probability)} for token, probability in top.items()]
    return AIMessage(text, response_metadata={"logprobs": {"content": [{"token": text, "logprob": 0.0, "top_logprobs": tokens}]}})


def scored(message, size=3):
    model = FakeMessagesListChatModel(responses=[message])
    return score_by_chat(model, ["prompt"], COMMENTS[:1], size, {})


def test_the_prompt_shows_passage_question_and_lettered_options():
    prompt = option_prompt(QUERY, OPTIONS, COMMENTS[0], None)
    assert "<passage>\nDeeds return.\n</passage>" in prompt
    assert QUERY in prompt
    assert "A. Yes\nB. No\nC. Unsure" in prompt


def test_a_population_opens_the_prompt_and_changes_nothing_else():
    plain, from_ghana = (option_prompt(QUERY, OPTIONS, COMMENTS[0], population) for population in (None, "Ghana"))
    assert from_ghana == f"You answer as a person from Ghana would.\n{plain}"


def test_token_probabilities_are_summed_over_spellings_of_a_letter_and_normalised():
    distribution, notes = scored(with_logprobs({"A": 0.4, " A": 0.1, "B": 0.25, "The": 0.2}))
    assert distribution == [pytest.approx([2 / 3, 1 / 3, 0])]
    assert notes == []


@given(st.dictionaries(st.sampled_from(LETTERS), st.floats(1e-6, 1), min_size=1))
def test_token_probabilities_give_a_distribution_in_proportion(top):
    [distribution], _ = scored(with_logprobs(top), size=26)
    assert sum(distribution) == pytest.approx(1)
    total = sum(top.values())
    assert distribution == pytest.approx([top.get(letter, 0) / total for letter in LETTERS])


def test_letters_beyond_the_options_do_not_count():
    distribution, _ = scored(with_logprobs({"D": 0.5, "B": 0.3, "C": 0.1}))
    assert distribution == [pytest.approx([0, 0.75, 0.25])]


def test_token_probabilities_without_any_letter_leave_the_answered_letter():
    distribution, notes = scored(with_logprobs({"The": 0.5}, text="B"))
    assert distribution == [[0, 1, 0]]
    assert "one vote after the comments from: Karma" in notes[0]


@pytest.mark.parametrize(
    ("text", "place"), [("A", 0), ("B.", 1), (" (C) Unsure", 2), ("**B**", 1), ("C: Unsure", 2), ("A Yes", 0), ("B\nbecause I say so", 1)]
)
def test_an_answered_letter_is_one_vote_and_that_is_noted(text, place):
    [distribution], notes = answers(text)
    assert distribution == [float(place == n) for n in range(3)]
    assert len(notes) == 1
    assert "one vote" in notes[0]


UNREADABLE = ["", "Maybe", "D", "I think A", "A patient may refuse.", "a", "Banana", "42", "It depends on B."]


@pytest.mark.parametrize("text", UNREADABLE)
def test_an_answer_that_is_no_letter_is_left_out_and_noted(text):
    found, notes = answers("B", text)
    assert found == [[0, 1, 0], None]
    assert any("do not count: Honor" in note for note in notes)


@given(st.text(max_size=30))
def test_an_answer_is_one_vote_or_left_out_but_never_spread_evenly(text):
    [distribution], notes = answers(text)
    assert distribution is None or sorted(distribution) == [0, 0, 1]
    assert ("could not be read" in notes[0]) == (distribution is None)


def test_the_local_model_s_probabilities_are_taken_as_they_are():
    engine = FakeEngine()
    rows, notes = score_locally(engine, ["one", "two"], COMMENTS, 3)
    assert [r.letters for r in engine.requests] == [("A", "B", "C")] * 2
    assert rows == [list(engine.score(request).result().probabilities) for request in engine.requests[:2]]
    assert notes == []


class Hesitant(FakeEngine):
    """Gives the letters little of its probability and cuts the prompt where it is asked the second."""

    def score(self, request):
        long = request.messages[0]["content"] == "two"
        future = Future()
        future.set_result(Scores((0.2, 0.3, 0.5), mass=0.01 if long else 0.5, cut_tokens=7 if long else 0))
        return future


def test_a_model_that_was_not_about_to_say_a_letter_and_a_prompt_that_was_cut_are_noted():
    _, notes = score_locally(Hesitant(), ["one", "two"], COMMENTS, 3)
    assert len(notes) == 2
    assert "comments from: Honor. Read their share with care" in notes[0]
    assert "too long" in notes[1]


def test_the_whole_graph_leaves_an_unreadable_answer_out_of_the_mean(make_resources):
    resources = make_resources(main_llm=FakeListChatModel(responses=["A", "B", "who knows"]))
    out = create_graph(resources=resources).invoke({"query": QUERY, "options": OPTIONS, "values": ["karma", "honor", "face"]})
    assert out["distribution"] == {"Yes": 0.5, "No": 0.5, "Unsure": 0.0}
    assert any("do not count: Face" in note for note in out["notes"])


def test_without_a_single_readable_answer_the_run_fails(make_resources):
    resources = make_resources(main_llm=FakeListChatModel(responses=["who knows"]))
    with pytest.raises(AggregationError, match="could be read as an option letter"):
        create_graph(resources=resources).invoke({"query": QUERY, "options": OPTIONS, "values": ["karma", "honor"]})


def test_a_distribution_in_words_begins_with_the_likeliest_option():
    assert in_words({"Yes": 0.25, "No": 0.75}) == "No: 75%; Yes: 25%."
