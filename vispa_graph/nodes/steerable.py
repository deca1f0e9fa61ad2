"""An answer faithful to one attribute: a value, a right, a duty or a group."""

from __future__ import annotations

import re
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig

from vispa_graph.attributes import ATTRIBUTE, read_attribute
from vispa_graph.composing import attribute_sentences, nearest_comment, split_sentences
from vispa_graph.conversation import in_context
from vispa_graph.errors import AggregationError
from vispa_graph.nodes.distributional import in_words, option_distribution
from vispa_graph.passages import cut_note, cut_tokens, incomplete, number_passages
from vispa_graph.prompts import fence, load_prompt
from vispa_graph.resources import Resources
from vispa_graph.state import Comment, State
from vispa_graph.tracing import traced
from vispa_graph.waiting import Steps, answer_of


def steerable(state: State, config: RunnableConfig, *, resources: Resources) -> Steps[dict[str, Any]]:
    """Choose the comment that best reflects the attribute, and answer from it; with options, by a distribution over them.

    Raises:
        AggregationError: There is nothing to choose from, or the answer came back empty.
    """
    comments = [comment for comment in state["comments"] if comment["text"]]
    if not comments:
        raise AggregationError("No comment holds any text, so there is none to choose. Try a smaller strength or another model.")
    comment, reason, notes, cut = yield from _choose(state, comments, config, resources)
    update: dict[str, Any] = {"chosen": {"value": comment["value"], "reason": reason}}
    if state["options"]:
        distribution, more, scored = yield from option_distribution(state, [comment], config, resources)
        if resources.settings.distribution != "comments":
            more = [
                *more,
                f"The setting distribution={resources.settings.distribution!r} is the distributional mode's: this one was read after a comment.",
            ]
        notes = notes + more + cut_note(state["comments"], {"choice": [cut], "options": scored})
        return update | {"distribution": distribution, "response": in_words(distribution), "attribution": [], "notes": notes}
    if resources.composes:
        attribution = traced("compose", lambda: [{"sentence": s, "values": [comment["value"]]} for s in split_sentences(comment["text"])], config)
        return update | {"response": comment["text"], "attribution": attribution, "notes": notes + cut_note(state["comments"])}
    prompt = load_prompt("steerable_answer").render(
        query=fence(in_context(state)), passage=fence(comment["text"]), attribute=fence(read_attribute(state["attribute"] or "").text)
    )
    message = yield from answer_of(resources.summariser, [HumanMessage(prompt)], {**config, "run_name": "answer"})
    response = message.text.strip()
    notes = notes + incomplete(message, "answer") + cut_note(state["comments"], {"choice": [cut], "answer": [cut_tokens(message)]})
    if not response:
        raise AggregationError("The main language model returned an empty answer. Try another one, or aggregation='compose'.")
    return update | {"response": response, "attribution": attribute_sentences(response, [comment], resources.encoder), "notes": notes}


def _choose(state: State, comments: list[Comment], config: RunnableConfig, resources: Resources) -> Steps[tuple[Comment, str, list[str], int]]:
    """The comment to rest on, the reason, notes, and how many tokens were left out of the prompt for the choice."""
    asked = state["attribute"] or ""
    if asked in resources.taxonomy:
        value = resources.taxonomy[asked].id
        for comment in comments:
            if comment["value"] == value:
                return comment, "the attribute names this value", [], 0
    for comment in comments:
        if comment["value"] == ATTRIBUTE:
            if len(comments) == 1 or resources.steers_toward(asked):
                return comment, "made by steering toward the attribute itself", [], 0
            comments = [other for other in comments if other is not comment]
    attribute = read_attribute(asked)
    nearest = nearest_comment(attribute.text, comments, resources.taxonomy, resources.encoder)
    if resources.composes:
        note = "The answer was not made from the attribute itself: it is the comment whose value and text are nearest to it."
        return nearest, "nearest to the attribute by sentence embedding", [note], 0
    prompt = load_prompt("steerable_choose").render(
        query=fence(in_context(state)), passages=number_passages(comments), attribute=fence(attribute.text)
    )
    message = yield from answer_of(resources.summariser, [HumanMessage(prompt)], {**config, "run_name": "choose"})
    numbers = {int(n) for n in re.findall(r"\d{1,3}", message.text)} & set(range(1, len(comments) + 1))
    if len(numbers) == 1:
        return comments[numbers.pop() - 1], "chosen by the main language model", [], cut_tokens(message)
    note = "The main language model's choice of a comment could not be read, so the one nearest to the attribute was taken."
    return nearest, "nearest to the attribute by sentence embedding", [note], cut_tokens(message)
