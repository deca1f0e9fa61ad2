"""Comments as numbered passages inside a prompt, and what to say where one did not fit."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.messages import AIMessage

from vispa_graph.prompts import fence
from vispa_graph.state import Comment


def number_passages(comments: Sequence[Comment]) -> str:
    """The comments, fenced and numbered from 1."""
    return "\n\n".join(f'<passage number="{number}">\n{fence(comment["text"])}\n</passage>' for number, comment in enumerate(comments, 1))


def incomplete(message: AIMessage, what: str) -> list[str]:
    """Notes on what was cut off: the middle of the prompt, or the end of the answer."""
    facts = message.response_metadata
    notes = []
    if facts.get("cut_tokens"):
        notes.append(f"The comments were too long for the main language model's context: the middle of the prompt for the {what} was left out.")
    if facts.get("finish_reason") == "length":
        notes.append(f"The {what} ends where the main language model reached its longest length.")
    return notes
