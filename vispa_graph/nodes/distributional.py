"""A probability for every option, as a population would answer."""

from __future__ import annotations

from typing import Any

from langchain_core.runnables import RunnableConfig

from vispa_graph.conversation import in_context
from vispa_graph.errors import AggregationError
from vispa_graph.resources import Resources
from vispa_graph.scoring import option_prompt, score_by_chat, score_locally
from vispa_graph.state import Comment, State, weights


def distributional(state: State, config: RunnableConfig, *, resources: Resources) -> dict[str, Any]:
    """The mean over comments of the option probabilities given each comment, by the weights of their values.

    Raises:
        AggregationError: No comment holds text, or no answer of the main language model could be read.
    """
    comments = [comment for comment in state["comments"] if comment["text"]]
    distribution, notes = option_distribution(state, comments, config, resources)
    return {"distribution": distribution, "response": in_words(distribution), "attribution": [], "notes": notes}


def option_distribution(state: State, comments: list[Comment], config: RunnableConfig, resources: Resources) -> tuple[dict[str, float], list[str]]:
    """The weighted mean distribution over the options given the comments; sums to 1."""
    if not comments:
        raise AggregationError("No comment holds any text, so there is nothing to score the options by. Try a smaller strength or another model.")
    options = state["options"] or []
    prompts = [option_prompt(in_context(state), options, comment, state["population"]) for comment in comments]
    if resources.main_llm is None:
        scored, notes = score_locally(resources.engine, prompts, comments, len(options))
        rows: list[list[float] | None] = [*scored]
    else:
        rows, notes = score_by_chat(resources.main_llm, prompts, comments, len(options), config)
    weight = weights(state)
    read = [[weight[comment["value"]] * share for share in row] for comment, row in zip(comments, rows, strict=True) if row is not None]
    if not read:
        raise AggregationError("None of the main language model's answers could be read as an option letter. Try another main language model.")
    sums = [sum(column) for column in zip(*read, strict=True)]
    total = sum(sums)
    return {option: share / total for option, share in zip(options, sums, strict=True)}, notes


def in_words(distribution: dict[str, float]) -> str:
    """The distribution as a sentence, most likely option first."""
    ranked = sorted(distribution.items(), key=lambda item: -item[1])
    return "; ".join(f"{option}: {probability:.0%}" for option, probability in ranked) + "."
