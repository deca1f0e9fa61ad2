"""What goes into a run, what it carries, and what comes out: plain, serialisable data only."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from typing_extensions import TypedDict

from vispa_graph.errors import EmptyQueryError, InputError, ModeInputError, OptionsError, UnknownModeError

Mode = Literal["overton", "steerable", "distributional"]
MODES: tuple[Mode, ...] = get_args(Mode)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class _Query(TypedDict):
    query: str  # the question or situation


class Input(_Query, total=False):
    """What the caller gives. Only `query` is needed."""

    mode: Mode | None  # None: follows from the other inputs
    attribute: str | None  # whom to speak for: a value, right, duty or group
    population: str | None  # a country or people whose distribution is asked for
    options: list[str] | None  # 2 to 26 answers
    values: list[str] | None  # ids or names of the values to hear; skips selection


class Candidate(TypedDict):
    """A phrase of the taxonomy near the query."""

    text: str
    kind: str
    source: str
    values: dict[str, float]
    score: float
    row: int  # its place in the index


class SelectedValue(TypedDict):
    """A value at stake."""

    id: str
    name: str
    family: str
    source: str  # the theory or survey the value comes from
    score: float  # 0..1
    reason: str
    weight: float  # relative, above 0: 1 unless a reviewer chose another


class SteeringFacts(TypedDict):
    """What steering did to a comment; see `vispa_graph.engine.contract.SteeringReport`."""

    method: str
    layers: list[int]
    magnitude: list[float]
    before: list[float] | None
    after: list[float] | None
    displacement: float


class Comment(TypedDict):
    """What the steered model said for a value."""

    value: str  # id
    name: str
    text: str
    finish: str  # "stop" or "length"
    tokens: int
    cut_tokens: int  # left out of the middle of its prompt to fit the model's context
    steering: SteeringFacts | None  # None where strength is 0


class Chosen(TypedDict):
    """The comment that a steerable answer rests on."""

    value: str
    reason: str


class Attribution(TypedDict):
    """A sentence of the response and the values it rests on."""

    sentence: str
    values: list[str]


class Door(TypedDict):
    """The input once it has been checked: every key is there."""

    query: str
    mode: Mode
    attribute: str | None
    population: str | None
    options: list[str] | None
    asked: list[str] | None  # the values the caller named
    ignored: list[str]  # keys that were left out: unknown ones that look like a misspelt one, and `mode` where an earlier answer left it


class Output(TypedDict):
    """What a run gives back."""

    mode: Mode
    response: str
    values: list[SelectedValue]
    comments: list[Comment]
    distribution: dict[str, float] | None  # option -> probability; None without options
    chosen: Chosen | None  # steerable only
    attribution: list[Attribution]
    notes: list[str]  # whatever the reader must know: a fallback, a truncation


class State(Door, total=False):
    """Everything a run carries from node to node."""

    made_with: Annotated[dict[str, Any], operator.or_]  # what decides the result; see vispa_graph.provenance
    turns: list[str]  # the questions this turn is read with, its own last; see vispa_graph.conversation
    candidates: list[Candidate]
    values: list[SelectedValue]
    comments: Annotated[list[Comment], operator.add]  # one task per value adds its own
    response: str
    distribution: dict[str, float] | None
    chosen: Chosen | None
    attribution: list[Attribution]
    notes: Annotated[list[str], operator.add]


class SteerTask(TypedDict):
    """What one steer task gets: all it needs, by value, so that a cached result of one model is told from another's."""

    query: str
    prompt: str
    value: str
    attribute: str | None  # where the value is made of it
    mode: Mode
    made_with: dict[str, Any]


def check_input(data: Mapping[str, Any]) -> Door:
    """The input with every key present and the mode decided.

    Raises:
        InputError: One of its kinds for each thing that can be wrong.
    """
    if not isinstance(data, Mapping):
        raise InputError('The input must be a mapping such as {"query": "..."}.')
    query = _text(data, "query")
    if not query:
        raise EmptyQueryError('The query is empty or missing. Give a question or a situation as {"query": "..."}.')
    attribute, population = _text(data, "attribute"), _text(data, "population")
    for key, text in (("attribute", attribute), ("population", population)):
        if text == "":
            raise InputError(f"{key!r} is blank. Write it out or leave it out.")
    options = _texts(data, "options")
    if options is not None:
        options = check_options(options)
    # A host that keeps its state hands back values and mode of our last answer under the same keys: they were not asked for.
    earlier, named = data.get("values"), data.get("mode")
    answered = isinstance(earlier, list) and bool(earlier) and all(isinstance(value, Mapping) and "reason" in value for value in earlier)
    values = None if answered else _texts(data, "values")
    if values is not None and not values:
        raise InputError("The list of values is empty. Name at least one value, or leave the list out to have them selected.")
    left = answered and named in MODES
    mode = resolve_mode(None if left else named, attribute=attribute, population=population, options=options)
    return Door(
        query=query,
        mode=mode,
        attribute=attribute,
        population=population,
        options=options,
        asked=values,
        ignored=[*_misspelt(data), *(["mode"] if left and mode != named else [])],
    )


def resolve_mode(mode: Any, *, attribute: str | None, population: str | None, options: list[str] | None) -> Mode:
    """The mode asked for, or the one that follows from the inputs.

    An attribute, with options or without, speaks for someone: steerable. Options alone, or a population, ask for a distribution.

    Raises:
        UnknownModeError: There is no such mode.
        ModeInputError: The mode needs something that was not given.
    """
    if mode is None:
        mode = "steerable" if attribute else "distributional" if options or population else "overton"
    if mode not in MODES:
        raise UnknownModeError(f"There is no such mode. Choose one of {', '.join(MODES)}, or none to have it follow from the inputs.")
    if mode == "steerable" and not attribute:
        raise ModeInputError(
            "The steerable mode needs an attribute to speak for: a value, a right, a duty or a group. Give one, or choose another mode."
        )
    if mode == "distributional" and not options:
        raise ModeInputError("The distributional mode needs answer options to spread probability over. Give 2 to 26 of them, or choose another mode.")
    return mode  # type: ignore[no-any-return]


def weights(state: State) -> dict[str, float]:
    """The weight of every selected value, by its id."""
    return {value["id"]: value["weight"] for value in state["values"]}


def unused_inputs(state: Door) -> list[str]:
    """The inputs that were given but that the mode does not use."""
    unused = {"overton": ("attribute", "population", "options"), "distributional": ("attribute",), "steerable": ()}[state["mode"]]
    if state["mode"] == "steerable" and not state["options"]:
        unused = ("population",)
    given: dict[str, Any] = {"attribute": state["attribute"], "population": state["population"], "options": state["options"]}
    return [key for key in unused if given[key]]


def check_options(options: Sequence[str]) -> list[str]:
    """The options without surrounding blanks.

    Raises:
        OptionsError: There are fewer than 2 or more than 26, or some are blank or the same.
    """
    cleaned = [option.strip() for option in options]
    if not 2 <= len(cleaned) <= len(LETTERS):
        raise OptionsError(f"A distribution needs 2 to {len(LETTERS)} options, and {len(cleaned)} came. Give as many as that.")
    blank = [number for number, option in enumerate(cleaned, 1) if not option]
    if blank:
        raise OptionsError(f"Option {blank[0]} is blank. Write it out or leave it out.")
    for number, option in enumerate(cleaned, 1):
        first = [o.casefold() for o in cleaned].index(option.casefold()) + 1
        if first != number:
            raise OptionsError(f"Options {first} and {number} are the same. Leave one of them out.")
    return cleaned


def _text(data: Mapping[str, Any], key: str) -> str | None:
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(f"{key!r} must be text, not {type(value).__name__}.")
    return _encodable(value, key).strip()


def _texts(data: Mapping[str, Any], key: str) -> list[str] | None:
    value = data.get(key)
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(entry, str) for entry in value):
        raise InputError(f"{key!r} must be a list of texts.")
    return [_encodable(entry, key) for entry in value]


def _encodable(text: str, key: str) -> str:
    """The text, unless it holds half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{key!r} is not valid Unicode text: it holds a lone surrogate. Decode it as UTF-8 first.") from None
    return text


def _misspelt(data: Mapping[str, Any]) -> list[str]:
    """Unknown keys close to a known one. Others are left alone: a host graph passes its own state along."""
    known = list(Input.__annotations__)
    carried = set(known) | set(State.__annotations__)
    return [key for key in data if isinstance(key, str) and key not in carried and difflib.get_close_matches(key, known, cutoff=0.8)]
