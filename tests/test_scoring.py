"""A probability for every option: read from the model, or openly left out, never made up."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models import FakeListChatModel
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage
from tiny_models import tiny_engine

from vispa_graph.engine.contract import ScoreRequest, Scores
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.errors import AggregationError, NonFiniteError
from vispa_graph.graph import create_graph
from vispa_graph.nodes.distributional import in_words
from vispa_graph.scoring import Ballot, decode_plurally, mean_distribution, option_prompt, pluralistic_logits, rotations, score_by_chat, score_locally
from vispa_graph.state import LETTERS
from vispa_graph.waiting import run_steps

QUERY = "Should he have the operation?"
OPTIONS = ["Yes", "No", "Unsure"]
VOTERS = ("Karma", "Honor")


def ballots(*prompts, size=3):
    """A ballot in the options' own order for each prompt."""
    return [Ballot(voter, tuple(range(size)), prompt) for voter, prompt in zip(VOTERS, prompts, strict=False)]


def answers(*texts):
    return run_steps(score_by_chat(FakeListChatModel(responses=list(texts)), ballots(*["prompt"] * len(texts)), {}))


def with_logprobs(top, text="?"):
    tokens = [{"token": token, "logprob": math.log(probability)} for token, probability in top.items()]
    return AIMessage(text, response_metadata={"logprobs": {"content": [{"token": text, "logprob": 0.0, "top_logprobs": tokens}]}})


def scored(message, size=3):
    model = FakeMessagesListChatModel(responses=[message])
    return run_steps(score_by_chat(model, ballots("prompt", size=size), {}))


def test_the_prompt_shows_passage_question_and_lettered_options():
    prompt = option_prompt(QUERY, OPTIONS, "Deeds return.", None)
    assert "<passage>\nDeeds return.\n</passage>" in prompt
    assert QUERY in prompt
    assert "A. Yes\nB. No\nC. Unsure" in prompt


def test_without_a_comment_the_prompt_is_the_question_with_its_options():
    prompt = option_prompt(QUERY, OPTIONS, None, None)
    assert prompt.startswith("<question>")
    assert "passage" not in prompt
    assert "A. Yes\nB. No\nC. Unsure" in prompt


def test_a_population_opens_the_prompt_and_changes_nothing_else():
    plain, from_ghana = (option_prompt(QUERY, OPTIONS, "Deeds return.", population) for population in (None, "Ghana"))
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
    rows, notes, cut = run_steps(score_locally(engine, ballots("one", "two")))
    assert [r.letters for r in engine.requests] == [("A", "B", "C")] * 2
    assert rows == [list(engine.score(request).result().probabilities) for request in engine.requests[:2]]
    assert (notes, cut) == ([], [0, 0])


class Hesitant(FakeEngine):
    """Gives the letters little of its probability and cuts the prompt where it is asked the second."""

    def score(self, request):
        long = request.messages[0]["content"] == "two"
        future = Future()
        future.set_result(Scores((0.2, 0.3, 0.5), mass=0.01 if long else 0.5, cut_tokens=7 if long else 0))
        return future


def test_a_model_that_was_not_about_to_say_a_letter_is_noted_and_what_was_cut_is_told():
    _, [note], cut = run_steps(score_locally(Hesitant(), ballots("one", "two")))
    assert "probability from: Honor. Read their share with care" in note
    assert cut == [0, 7]


def test_the_whole_graph_leaves_an_unreadable_answer_out_of_the_mean(make_resources):
    resources = make_resources(main_llm=FakeListChatModel(responses=["A", "B", "who knows"]))
    out = create_graph(resources=resources).invoke({"query": QUERY, "options": OPTIONS, "values": ["karma", "honor", "face"]})
    assert out["distribution"] == {"Yes": 0.5, "No": 0.5, "Unsure": 0.0}
    assert any("do not count: Face" in note for note in out["notes"])


def test_without_a_single_readable_answer_the_run_fails(make_resources):
    resources = make_resources(main_llm=FakeListChatModel(responses=["who knows"]))
    with pytest.raises(AggregationError, match="could be read as an option letter"):
        create_graph(resources=resources).invoke({"query": QUERY, "options": OPTIONS, "values": ["karma", "honor"]})


# Orders of the options


@given(st.integers(2, 26), st.integers(1, 26))
def test_orders_begin_with_the_options_own_and_never_repeat(size, count):
    orders = rotations(size, count)
    assert orders[0] == tuple(range(size))
    assert len(set(orders)) == len(orders) == min(size, count)
    assert all(sorted(order) == list(range(size)) for order in orders)


@given(st.integers(2, 26))
def test_in_all_orders_every_option_stands_once_under_every_letter(size):
    orders = rotations(size, size)
    assert all(sorted(order[place] for order in orders) == list(range(size)) for place in range(size))


class Biased(FakeEngine):
    """Prefers the first letter, whatever stands under it, and an option that reads "Yes"."""

    def score(self, request):
        self.requests.append(request)
        text = request.messages[0]["content"]
        weights = [4.0 if place == 0 else 1.0 for place in range(len(request.letters))]
        for place, letter in enumerate(request.letters):
            if f"{letter}. Yes" in text:
                weights[place] += 3.0
        future = Future()
        future.set_result(Scores(tuple(w / sum(weights) for w in weights), 0.9, 0))
        return future


@pytest.mark.parametrize("way", ["comments", "direct"])
def test_all_orders_of_the_options_take_the_preference_for_a_letter_out(make_resources, way):
    given = {"options": ["No", "Yes", "Unsure"], "values": ["karma", "honor"], "query": QUERY}
    once, averaged = (
        create_graph(resources=make_resources(engine=Biased(), distribution=way, option_orders=n)).invoke(given)["distribution"] for n in (1, 3)
    )
    assert once["No"] > once["Unsure"]
    assert averaged["No"] == pytest.approx(averaged["Unsure"])
    assert averaged["Yes"] > averaged["No"]
    assert sum(averaged.values()) == pytest.approx(1)


def test_a_chat_models_vote_is_counted_for_the_option_under_its_letter():
    asked = [Ballot("Karma", (0, 1, 2), "p"), Ballot("Karma", (2, 0, 1), "p")]
    rows, _ = run_steps(score_by_chat(FakeListChatModel(responses=["A", "A"]), asked, {}))
    assert rows == [[1, 0, 0], [0, 0, 1]]


def test_every_voter_weighs_the_same_however_many_of_its_ballots_could_be_read():
    ballots = [Ballot(voter, (0, 1), "") for voter in ("Karma", "Karma", "Honor", "Honor")]
    assert mean_distribution(ballots, [[1, 0], [1, 0], [0, 1], None]) == [0.5, 0.5]
    assert mean_distribution(ballots, [None] * 4) is None


# Without comments


@pytest.mark.parametrize("way", ["direct", "decoding"])
def test_a_distribution_without_comments_makes_none_and_asks_once_a_value(make_resources, way):
    engine = FakeEngine()
    resources = make_resources(engine=engine, distribution=way)
    out = create_graph(resources=resources).invoke({"query": QUERY, "options": OPTIONS, "values": ["karma", "honor"], "population": "Ghana"})
    assert out["comments"] == []
    assert sum(out["distribution"].values()) == pytest.approx(1)
    assert list(out["distribution"]) == OPTIONS
    assert out["response"].endswith("%.")
    steered = [request for request in engine.requests if request.steering]
    assert [request.steering.direction.value for request in steered] == ["karma", "honor"]
    assert len(engine.requests) - len(steered) == (1 if way == "decoding" else 0)
    assert {request.messages[0]["content"] for request in engine.requests} == {option_prompt(QUERY, OPTIONS, None, "Ghana")}


def test_other_modes_make_comments_whatever_the_way_of_a_distribution(make_resources):
    graph = create_graph(resources=make_resources(distribution="direct"))
    assert len(graph.invoke({"query": QUERY, "values": ["karma"]})["comments"]) == 1
    assert len(graph.invoke({"query": QUERY, "values": ["karma"], "attribute": "karma", "options": OPTIONS})["comments"]) == 1


@pytest.fixture(scope="module")
def model():
    engine = tiny_engine(chat=True)
    yield engine
    engine.close()


def test_direct_is_the_mean_of_the_letters_after_each_steered_prefill(make_resources, model):
    resources = make_resources(engine=model, distribution="direct", layers=(1, 2), method="mean_difference")
    out = create_graph(resources=resources).invoke({"query": QUERY, "options": OPTIONS, "values": ["karma", "honor"]})
    message = {"role": "user", "content": option_prompt(QUERY, OPTIONS, None, None)}
    rows = [model.score(ScoreRequest([message], ("A", "B", "C"), resources.steering(v))).result().probabilities for v in ("karma", "honor")]
    assert rows[0] != pytest.approx(rows[1], abs=1e-6)
    assert list(out["distribution"].values()) == pytest.approx(np.mean(rows, axis=0), abs=1e-6)


def test_decoding_reads_the_letters_of_the_mixed_logits_over_the_whole_vocabulary(make_resources, model):
    resources = make_resources(engine=model, distribution="decoding", layers=(1, 2), method="mean_difference")
    out = create_graph(resources=resources).invoke({"query": QUERY, "options": OPTIONS, "values": ["karma", "honor"]})
    message = {"role": "user", "content": option_prompt(QUERY, OPTIONS, None, None)}
    steerings = [resources.steering("karma"), resources.steering("honor"), None]
    found = [model.score(ScoreRequest([message], ("A", "B", "C"), steering, True)).result() for steering in steerings]
    logits = pluralistic_logits(np.array([s.logits for s in found[:2]], dtype=float), found[2].logits.astype(float))
    probabilities = np.exp(logits - logits.max())
    letters = [probabilities[list(ids)].sum() for ids in found[2].spellings]
    assert [len(ids) for ids in found[2].spellings] == [2, 2, 2]
    assert list(out["distribution"].values()) == pytest.approx(np.array(letters) / sum(letters), abs=1e-6)


def test_decoding_says_who_was_asked_where_the_model_was_not_about_to_say_a_letter():
    class Silent(FakeEngine):
        def score(self, request):
            future = Future()
            logits = np.array([0.0, 0.0, 0.0, 9.0], dtype=np.float32)
            future.set_result(Scores((0.3, 0.3, 0.4), 0.001, 5, logits, ((0,), (1,), (2,))))
            return future

    rows, notes, cut = run_steps(decode_plurally(Silent(), ballots("one", "one")))
    assert cut == [5, 5, 5]
    assert rows == [pytest.approx([1 / 3] * 3)]
    assert len(notes) == 1
    assert "Karma, Honor" in notes[0]


@pytest.mark.parametrize("other", [9000.0, np.nan])
def test_letters_without_any_probability_in_the_mixture_are_an_error_and_not_a_guess(other):
    class Mute(FakeEngine):
        def score(self, request):
            future = Future()
            future.set_result(Scores((0.3, 0.3, 0.4), 1e-300, 5, np.array([0, 0, 0, other], dtype=np.float32), ((0,), (1,), (2,))))
            return future

    with pytest.raises(NonFiniteError, match="none of the option letters"):
        run_steps(decode_plurally(Mute(), ballots("one")))


def test_an_engine_that_gives_no_logits_cannot_be_decoded_from():
    with pytest.raises(AggregationError, match="no logits"):
        run_steps(decode_plurally(Hesitant(), ballots("one")))


# Pluralistic decoding


finite_logits = st.lists(st.floats(-20, 20), min_size=12, max_size=12)


@given(finite_logits, finite_logits)
def test_a_single_perspective_is_only_contrasted(one, plain):
    one, plain = np.array(one), np.array(plain)
    assert pluralistic_logits(one[None], plain) == pytest.approx(1.2 * one - 0.2 * plain)


@given(finite_logits, finite_logits)
def test_perspectives_that_agree_count_as_one(one, plain):
    one, plain = np.array(one), np.array(plain)
    assert pluralistic_logits(np.stack([one] * 4), plain) == pytest.approx(pluralistic_logits(one[None], plain))


@given(st.lists(finite_logits, min_size=2, max_size=4), finite_logits)
def test_the_order_of_the_perspectives_does_not_matter(perspectives, plain):
    found = [pluralistic_logits(np.array(order), np.array(plain)) for order in itertools.permutations(perspectives)]
    assert all(one == pytest.approx(found[0], abs=1e-9) for one in found)


def test_the_surer_perspective_weighs_more_by_the_softmax_of_the_entropies():
    sure, unsure, plain = np.zeros(50), np.zeros(50), np.zeros(50)
    sure[3] = 8.0
    mixed = pluralistic_logits(np.stack([sure, unsure]), plain)
    top = np.exp(np.sort(sure)[-10:] / 0.4)
    top /= top.sum()
    entropies = np.array([-(top * np.log(top)).sum(), math.log(10)])
    weight = np.exp(-entropies[0]) / np.exp(-entropies).sum()
    assert weight > 0.9
    assert mixed == pytest.approx(weight * 1.2 * sure)


def test_in_decoding_a_weight_counts_as_that_many_perspectives():
    one, two = ballots("one", "two")
    [weighted], [repeated], [alike] = (
        run_steps(decode_plurally(FakeEngine(), asked))[0] for asked in ([replace(one, weight=3), two], [one] * 3 + [two], [one, two])
    )
    assert weighted == pytest.approx(repeated)
    assert weighted != pytest.approx(alike)


def test_a_distribution_in_words_begins_with_the_likeliest_option():
    assert in_words({"Yes": 0.25, "No": 0.75}) == "No: 75%; Yes: 25%."
