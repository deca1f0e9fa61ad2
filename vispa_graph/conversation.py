"""What a turn sees of the turns before it on the same thread.

A follow-up such as "and if she were 16?" says little alone, so it is read together with earlier questions: with the one that opened
the thread, which tells the case, and with the latest ones. Our own answers are left out on purpose. In the selection they would find
again the values that were heard before; in a prompt they would push every comment toward what was said, where only the activations
may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from vispa_graph.state import State

# The opening question and the last three.
RECALLED = 4
# Characters that are read of an earlier question.
LONGEST = 2000


def recall(asked: Sequence[str], query: str) -> list[str]:
    """The questions this turn is read with, its own last, each whole.

    Args:
        asked: What was recalled in the turn before; its first is the question that opened the thread, which stays.
        query: This turn's.

    Returns:
        At most `RECALLED` + 1 questions.
    """
    opening = list(asked[:1])
    latest = [question for question in asked[1:] if question not in (*opening, query)]
    return [*opening, *latest[-(RECALLED - 1) :], query]


def as_read(turns: Sequence[str]) -> list[str]:
    """The questions as prompts and the selection hold them: earlier ones of at most `LONGEST` characters, and one asked again at once only once."""
    *earlier, query = turns
    if earlier == [query]:
        earlier = []
    return [*(question[:LONGEST] for question in earlier), query]


def reading_notes(turns: Sequence[str]) -> list[str]:
    """What the reader must know of the questions that a turn is read with."""
    earlier = turns[: len(as_read(turns)) - 1]
    notes = []
    if earlier:
        count = "the earlier question" if len(earlier) == 1 else f"{len(earlier)} earlier questions"
        notes.append(f"Read together with {count} of this thread.")
    if any(len(question) > LONGEST for question in earlier):
        notes.append(f"Of earlier questions only the first {LONGEST} characters were read.")
    return notes


def in_context(state: State) -> str:
    """The query with the questions it follows up on, oldest first, one a line: what comments and answers are about."""
    return "\n".join(as_read(state["turns"]))
