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
# Characters that are kept of an earlier question.
LONGEST = 2000


def recall(asked: Sequence[str], query: str) -> tuple[list[str], list[str]]:
    """The questions this turn is read with, its own last, and notes for the reader.

    Args:
        asked: Earlier questions of the thread, oldest first.
        query: This turn's. Where it was asked before, the earlier one does not count.

    Returns:
        At most `RECALLED` + 1 questions, the earlier ones of at most `LONGEST` characters each.
    """
    before = [question for question in asked if question != query]
    earlier = [*before[:1], *before[1:][-(RECALLED - 1) :]]
    notes = []
    if earlier:
        count = "the earlier question" if len(earlier) == 1 else f"{len(earlier)} earlier questions"
        notes.append(f"Read together with {count} of this thread.")
    if any(len(question) > LONGEST for question in earlier):
        notes.append(f"Of earlier questions only the first {LONGEST} characters were read.")
    return [*(question[:LONGEST] for question in earlier), query], notes


def in_context(state: State) -> str:
    """The query with the questions it follows up on, oldest first, one a line: what comments and answers are about."""
    return "\n".join(state["turns"])
