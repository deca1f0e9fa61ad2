"""Comments as numbered passages inside a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from vispa_graph.prompts import fence
from vispa_graph.state import Comment


def number_passages(comments: Sequence[Comment]) -> str:
    """The comments, fenced and numbered from 1."""
    return "\n\n".join(f'<passage number="{number}">\n{fence(comment["text"])}\n</passage>' for number, comment in enumerate(comments, 1))
