"""A probability for every answer option, given a comment: from the local model's next token, or from a chat model's answer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig

from vispa_graph.engine.contract import Engine, ScoreRequest
from vispa_graph.prompts import fence, load_prompt
from vispa_graph.state import LETTERS, Comment
from vispa_graph.tracing import score_traced

# Below this share of the next token's probability, the letters were not what the model was about to say.
_LITTLE = 0.1

# "B", "(B)", "**B.** No": but not the article of "A patient may refuse", nor "I'd say".
_LETTER = re.compile(r"^\W*([A-Z])\b(?![ \t]*['’]?[ \t]*[a-z])")


def option_prompt(query: str, options: Sequence[str], comment: Comment, population: str | None) -> str:
    """The question with lettered options, the comment as a passage before it."""
    lines = "\n".join(f"{letter}. {fence(option)}" for letter, option in zip(LETTERS, options, strict=False))
    prompt = load_prompt("score_options").render(passage=fence(comment["text"]), query=fence(query), options=lines)
    return f"{load_prompt('population').render(population=fence(population))}\n{prompt}" if population else prompt


def score_locally(
    engine: Engine, prompts: Sequence[str], comments: Sequence[Comment], size: int, config: RunnableConfig | None = None
) -> tuple[list[list[float]], list[str]]:
    """Next-token probabilities of the first `size` letters for each prompt, normalised; and notes for the reader."""
    letters = tuple(LETTERS[:size])
    requests = [ScoreRequest([{"role": "user", "content": prompt}], letters) for prompt in prompts]
    scores = score_traced(engine, requests, [comment["value"] for comment in comments], config)
    notes = []
    little = [c["name"] for c, s in zip(comments, scores, strict=True) if s.mass < _LITTLE]
    if little:
        notes.append(
            f"The model gave the option letters less than {_LITTLE:.0%} of its probability after the comments from: {', '.join(little)}. Read their share with care."
        )
    if any(s.cut_tokens for s in scores):
        notes.append("A passage or question was too long for the model's context: its middle was left out when the options were scored.")
    return [list(s.probabilities) for s in scores], notes


def score_by_chat(
    model: BaseChatModel, prompts: Sequence[str], comments: Sequence[Comment], size: int, config: RunnableConfig
) -> tuple[list[list[float] | None], list[str]]:
    """A distribution over the first `size` letters for each prompt, None where the answer could not be read; and notes.

    Token probabilities are used where the model returns them in `response_metadata["logprobs"]` (as OpenAI's do when asked);
    otherwise the letter it answers is one vote.
    """
    messages = model.batch([[HumanMessage(prompt)] for prompt in prompts], {**config, "run_name": "score options"})
    found: list[list[float] | None] = []
    voted: list[str] = []
    unread: list[str] = []
    for comment, message in zip(comments, messages, strict=True):
        distribution = _from_logprobs(message, size)
        if distribution is None:
            distribution = _from_letter(message, size)
            (voted if distribution else unread).append(comment["name"])
        found.append(distribution)
    notes = []
    if voted:
        notes.append(
            f"The main language model gave no token probabilities, so its answer counts as one vote after the comments from: {', '.join(voted)}."
        )
    if unread:
        notes.append(f"The main language model's answer could not be read as a letter, so these comments do not count: {', '.join(unread)}.")
    return found, notes


def _from_logprobs(message: AIMessage, size: int) -> list[float] | None:
    content: Any = (message.response_metadata.get("logprobs") or {}).get("content") or []
    if not content:
        return None
    mass = [0.0] * size
    for entry in content[0].get("top_logprobs", []):
        letter = entry["token"].strip()
        if len(letter) == 1 and letter in LETTERS[:size]:
            mass[LETTERS.index(letter)] += math.exp(entry["logprob"])
    total = sum(mass)
    return [m / total for m in mass] if total > 0 else None


def _from_letter(message: AIMessage, size: int) -> list[float] | None:
    match = _LETTER.match(message.text)
    if not match or match[1] not in LETTERS[:size]:
        return None
    return [float(letter == match[1]) for letter in LETTERS[:size]]
