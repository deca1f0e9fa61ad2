"""A probability for every option, as a population would answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.runnables import RunnableConfig

from vispa_graph.conversation import in_context
from vispa_graph.errors import AggregationError
from vispa_graph.passages import cut_note
from vispa_graph.resources import Resources
from vispa_graph.scoring import Ballot, decode_plurally, mean_distribution, option_prompt, rotations, score_by_chat, score_locally
from vispa_graph.state import Comment, State, weights
from vispa_graph.waiting import Steps


def distributional(state: State, config: RunnableConfig, *, resources: Resources) -> Steps[dict[str, Any]]:
    """The mean over comments of the option probabilities given each comment, by the weights of their values; or read from the steered model.

    Raises:
        AggregationError: No comment holds text, or no answer of the main language model could be read.
    """
    if resources.settings.distribution == "comments":
        comments = [comment for comment in state["comments"] if comment["text"]]
        distribution, notes, cut = yield from option_distribution(state, comments, config, resources)
    else:
        distribution, notes, cut = yield from steered_distribution(state, config, resources)
    notes += cut_note(state["comments"], {"options": cut})
    return {"distribution": distribution, "response": in_words(distribution), "attribution": [], "notes": notes}


def option_distribution(
    state: State, comments: list[Comment], config: RunnableConfig, resources: Resources
) -> Steps[tuple[dict[str, float], list[str], list[int]]]:
    """The weighted mean distribution over the options given the comments, which sums to 1; notes; and the tokens left out of each prompt."""
    if not comments:
        raise AggregationError("No comment holds any text, so there is nothing to score the options by. Try a smaller strength or another model.")
    ballots = [
        Ballot(c["name"], order, _prompt(state, order, c["text"]), None, c["value"], weights(state)[c["value"]])
        for c in comments
        for order in _orders(state, resources)
    ]
    rows: Sequence[Sequence[float] | None]
    cut: list[int] = []
    if resources.main_llm is None:
        rows, notes, cut = yield from score_locally(resources.engine, ballots, config)
    else:
        rows, notes = yield from score_by_chat(resources.summariser, ballots, config)
    mean = mean_distribution(ballots, rows)
    if mean is None:
        raise AggregationError("None of the main language model's answers could be read as an option letter. Try another main language model.")
    return _named(state, mean), notes, cut


def steered_distribution(state: State, config: RunnableConfig, resources: Resources) -> Steps[tuple[dict[str, float], list[str], list[int]]]:
    """The same from one steered prefill a value, no comment made: the mean of the values' distributions, or decoded from all together."""
    orders = _orders(state, resources)
    ballots = [
        Ballot(value["name"], order, _prompt(state, order, None), resources.steering(value["id"]), value["id"], value["weight"])
        for value in state["values"]
        for order in orders
    ]
    if resources.settings.distribution == "direct":
        rows, notes, cut = yield from score_locally(resources.engine, ballots, config)
        mean = mean_distribution(ballots, rows)
    else:
        rows, notes, cut = yield from decode_plurally(resources.engine, ballots, config)
        mean = mean_distribution([Ballot("", order, "") for order in orders], rows)
    return _named(state, mean or []), notes, cut


def _orders(state: State, resources: Resources) -> list[tuple[int, ...]]:
    return rotations(len(state["options"] or []), resources.settings.option_orders)


def _prompt(state: State, order: Sequence[int], passage: str | None) -> str:
    options = state["options"] or []
    return option_prompt(in_context(state), [options[number] for number in order], passage, state["population"])


def _named(state: State, probabilities: Sequence[float]) -> dict[str, float]:
    return dict(zip(state["options"] or [], probabilities, strict=True))


def in_words(distribution: dict[str, float]) -> str:
    """The distribution as a sentence, most likely option first."""
    ranked = sorted(distribution.items(), key=lambda item: -item[1])
    return "; ".join(f"{option}: {probability:.0%}" for option, probability in ranked) + "."
