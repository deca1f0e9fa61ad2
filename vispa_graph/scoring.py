"""A probability for every answer option: from the local model's next token, steered or after a comment, or from a chat model's answer."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig

from vispa_graph.engine.contract import Engine, ScoreRequest, Scores, Steering
from vispa_graph.errors import AggregationError, NonFiniteError
from vispa_graph.prompts import fence, load_prompt
from vispa_graph.state import LETTERS
from vispa_graph.tracing import score_traced
from vispa_graph.waiting import Steps, answers_of

Array = npt.NDArray[np.float64]

# Below this share of the next token's probability, the letters were not what the model was about to say.
_LITTLE = 0.1
# Pluralistic decoding (SAE-PD): the weight of the contrast, and the temperature and number of tokens that entropies are taken at and over.
_CONTRAST, _TEMPERATURE, _TOP = 0.2, 0.4, 10

# "B", "(B)", "**B.** No": but not the article of "A patient may refuse", nor "I'd say".
_LETTER = re.compile(r"^\W*([A-Z])\b(?![ \t]*['’]?[ \t]*[a-z])")


@dataclass(frozen=True)
class Ballot:
    """The options put to one perspective in one order.

    Attributes:
        voter: Whose perspective, as notes name it.
        order: The number of the option under each letter.
        prompt: With the options in that order.
        steering: Of the local model while it answers.
        value: Id of the value, as traces name it.
        weight: Of the voter beside the others.
    """

    voter: str
    order: tuple[int, ...]
    prompt: str
    steering: Steering | None = None
    value: str = ""
    weight: float = 1.0

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters that stand for options."""
        return tuple(LETTERS[: len(self.order)])

    def by_option(self, by_letter: Sequence[float]) -> list[float]:
        """Probabilities in the order of the options."""
        found = [0.0] * len(self.order)
        for option, probability in zip(self.order, by_letter, strict=True):
            found[option] = float(probability)
        return found


def rotations(size: int, count: int) -> list[tuple[int, ...]]:
    """Up to `count` orders of `size` options, the first their own, in which an option's places are spread evenly.

    In all `size` of them every option stands once under every letter.
    """
    count = min(count, size)
    return [tuple((place + turn * size // count) % size for place in range(size)) for turn in range(count)]


def option_prompt(query: str, options: Sequence[str], passage: str | None, population: str | None) -> str:
    """The question with lettered options, a comment as a passage before it where there is one."""
    lines = "\n".join(f"{letter}. {fence(option)}" for letter, option in zip(LETTERS, options, strict=False))
    if passage is None:
        prompt = load_prompt("score_options_direct").render(query=fence(query), options=lines)
    else:
        prompt = load_prompt("score_options").render(passage=fence(passage), query=fence(query), options=lines)
    return f"{load_prompt('population').render(population=fence(population))}\n{prompt}" if population else prompt


def mean_distribution(ballots: Sequence[Ballot], rows: Sequence[Sequence[float] | None]) -> list[float] | None:
    """The mean over voters, by their weights, of the mean over their ballots; None where not one ballot could be read."""
    by_voter: dict[str, list[Sequence[float]]] = defaultdict(list)
    weight = {ballot.voter: ballot.weight for ballot in ballots}
    for ballot, row in zip(ballots, rows, strict=True):
        if row is not None:
            by_voter[ballot.voter].append(row)
    if not by_voter:
        return None
    mean = np.average([np.mean(found, axis=0) for found in by_voter.values()], axis=0, weights=[weight[voter] for voter in by_voter])
    return [float(p) for p in mean / mean.sum()]


def score_locally(
    engine: Engine, ballots: Sequence[Ballot], config: RunnableConfig | None = None
) -> Steps[tuple[list[list[float]], list[str], list[int]]]:
    """For each ballot the next-token probabilities of the letters, normalised, in the order of the options; notes; tokens left out of each prompt."""
    scores = yield from _ask(engine, ballots, config)
    notes = _little([ballot.voter for ballot, s in zip(ballots, scores, strict=True) if s.mass < _LITTLE])
    rows = [ballot.by_option(s.probabilities) for ballot, s in zip(ballots, scores, strict=True)]
    return rows, notes, [s.cut_tokens for s in scores]


def decode_plurally(
    engine: Engine, ballots: Sequence[Ballot], config: RunnableConfig | None = None
) -> Steps[tuple[list[list[float]], list[str], list[int]]]:
    """For each order of the options one distribution, decoded from all perspectives together; notes; and the tokens left out of each prompt.

    Beside the steered ballots of an order, the model is asked unsteered, to contrast them with.
    """
    orders: dict[tuple[int, ...], list[Ballot]] = defaultdict(list)
    for ballot in ballots:
        orders[ballot.order].append(ballot)
    asked = [ballot for group in orders.values() for ballot in (*group, Ballot("", group[0].order, group[0].prompt))]
    answered = yield from _ask(engine, asked, config, full=True)
    scores = iter(answered)
    rows: list[list[float]] = []
    notes: list[str] = []
    for order, group in orders.items():
        found = [next(scores) for _ in group]
        plain = next(scores)
        logits = pluralistic_logits(np.array([_logits(s) for s in found]), _logits(plain), np.array([ballot.weight for ballot in group]))
        probabilities = _softmax(logits)
        letters = np.array([probabilities[list(ids)].sum() for ids in plain.spellings])
        mass = letters.sum()
        if not mass > 0:
            raise NonFiniteError(
                "The perspectives together give none of the option letters any probability. Ask with fewer options, or use distribution='comments'."
            )
        if mass < _LITTLE:
            notes += _little([ballot.voter for ballot in group])
        rows.append(Ballot("", order, "").by_option(letters / mass))
    return rows, list(dict.fromkeys(notes)), [s.cut_tokens for s in answered]


def pluralistic_logits(perspectives: Array, plain: Array, weights: Array | None = None) -> Array:
    """Next-token logits of several perspectives in one (SAE-PD, Luo et al. 2025).

    Each perspective is contrasted with the plain model, `(1 + a) l_i - a l_0`, and weighs the more the surer it is: softmax over minus
    the entropies of the 10 likeliest tokens at temperature 0.4. (The published code leaves out the minus that its comment asks for.)

    Args:
        perspectives: [n, vocabulary].
        plain: [vocabulary].
        weights: [n], above 0, by which the perspectives' own weights are multiplied.
    """
    contrasted = (1 + _CONTRAST) * perspectives - _CONTRAST * plain
    top = _softmax(np.sort(perspectives, axis=1)[:, -_TOP:] / _TEMPERATURE)
    entropies = -(top * np.log(np.maximum(top, 1e-300))).sum(axis=1)
    own = np.zeros(len(perspectives)) if weights is None else np.log(weights)
    mixed: Array = _softmax(own - entropies) @ contrasted
    return mixed


def score_by_chat(model: BaseChatModel, ballots: Sequence[Ballot], config: RunnableConfig) -> Steps[tuple[list[list[float] | None], list[str]]]:
    """A distribution over the options for each ballot, None where the answer could not be read; and notes.

    Token probabilities are used where the model returns them in `response_metadata["logprobs"]` (as OpenAI's do when asked);
    otherwise the letter it answers is one vote.
    """
    prompts: list[LanguageModelInput] = [[HumanMessage(ballot.prompt)] for ballot in ballots]
    messages = yield from answers_of(model, prompts, {**config, "run_name": "score options"})
    found: list[list[float] | None] = []
    voted: list[str] = []
    unread: list[str] = []
    for ballot, message in zip(ballots, messages, strict=True):
        size = len(ballot.order)
        distribution = _from_logprobs(message, size)
        if distribution is None:
            distribution = _from_letter(message, size)
            (voted if distribution else unread).append(ballot.voter)
        found.append(distribution and ballot.by_option(distribution))
    notes = []
    if voted:
        notes.append(
            f"The main language model gave no token probabilities, so its answer counts as one vote after the comments from: {_names(voted)}."
        )
    if unread:
        notes.append(f"The main language model's answer could not be read as a letter, so these comments do not count: {_names(unread)}.")
    return found, notes


def _ask(engine: Engine, ballots: Sequence[Ballot], config: RunnableConfig | None, *, full: bool = False) -> Steps[list[Scores]]:
    requests = [ScoreRequest([{"role": "user", "content": b.prompt}], b.letters, b.steering, full) for b in ballots]
    return (yield from score_traced(engine, requests, [ballot.value for ballot in ballots], config))


def _logits(scores: Scores) -> Array:
    """The logits as numbers that can be added: a token that is ruled out has a very small one."""
    if scores.logits is None:
        raise AggregationError("The engine gave no logits, which decoding needs. Use distribution='direct', or an engine whose `score` heeds `full`.")
    found: Array = np.maximum(scores.logits.astype(np.float64), -1e4)
    return found


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    found: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return found


def _little(voters: Sequence[str]) -> list[str]:
    if not voters:
        return []
    return [f"The model gave the option letters less than {_LITTLE:.0%} of its probability from: {_names(voters)}. Read their share with care."]


def _names(voters: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(voters))


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
