"""Comments as numbered passages inside a prompt, and what to say where something did not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from langchain_core.messages import AIMessage

from vispa_graph.prompts import fence
from vispa_graph.state import Comment


def number_passages(comments: Sequence[Comment]) -> str:
    """The comments, fenced and numbered from 1."""
    return "\n\n".join(f'<passage number="{number}">\n{fence(comment["text"])}\n</passage>' for number, comment in enumerate(comments, 1))


def incomplete(message: AIMessage, what: str) -> list[str]:
    """A note where the end of an answer was cut off."""
    if message.response_metadata.get("finish_reason") != "length":
        return []
    return [f"The {what} ends where the main language model reached its longest length."]


def cut_tokens(message: AIMessage) -> int:
    """How many tokens were left out of the prompt that a message answers; 0 where its model does not tell."""
    return int(message.response_metadata.get("cut_tokens") or 0)


def cut_note(comments: Sequence[Comment], others: Mapping[str, Sequence[int]] | None = None) -> list[str]:
    """One note on all that was left out of prompts to fit the model's context; none where everything fitted.

    Args:
        comments: Of the run.
        others: What else was asked for, with the tokens that were left out of each prompt for it.
    """
    cuts: dict[str, Sequence[int]] = {"comments": [comment["cut_tokens"] for comment in comments], **(others or {})}
    told = [f"{'up to ' if len(set(cut)) > 1 else ''}{max(cut)} for the {what}" for what, cut in cuts.items() if any(cut)]
    return [f"Too long for the model's context: tokens in the middle of prompts were left out, {', '.join(told)}."] if told else []
