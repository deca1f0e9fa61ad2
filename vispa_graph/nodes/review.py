"""Stop for a person to edit the values before any comment is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.types import interrupt

from vispa_graph.attributes import ATTRIBUTE
from vispa_graph.errors import InputError
from vispa_graph.privacy import REDACTED
from vispa_graph.resources import Resources
from vispa_graph.state import SelectedValue, State
from vispa_graph.taxonomy_index import Taxonomy

# A weight says how much more one value counts than another; beyond this the other might as well be removed.
HEAVIEST = 100.0

_UNUSED = "The steerable mode rests on one comment and does not use weights: those of the review were left out."
_JUDGED = "in the words of the language model that judged it, which are in the state under `values`"
_EXPECTED = 'Resume with a list of values, each an id or name, or {"id": ..., "weight": ...}.'


def review(state: State, config: RunnableConfig, *, resources: Resources) -> dict[str, Any]:
    """Interrupt with the selected values and their reasons; resume with the list to hear instead, in that order.

    What it shows holds no text of the user, since a host around the graph may trace it as it is. The question, and those that it follows,
    are in the state, under `query` and `turns`; an attribute of the caller's own goes by a neutral name, and reasons that a language model
    wrote are shown only where traces may hold content.

    An entry of the list is an id or name, also as it is shown, or one of the values shown, with another `weight` where it is to count
    more or less.
    Values left out are not heard; others of the taxonomy may be added.

    What cannot be used is refused by interrupting again, with the reason under `problem`: a run that failed on a resume value
    would be given the same value by every later resume. The node runs again from its top each time, so nothing before the
    interrupt has an effect.
    """
    shown: dict[str, Any] = {"values": [_shown(value, resources) for value in state["values"]]}
    while True:
        edited = interrupt(shown)
        try:
            values = _edited(edited, state["values"], resources.taxonomy)
        except InputError as error:
            shown = {**shown, "problem": str(error)}
            continue
        weighted = state["mode"] == "steerable" and any(value["weight"] != 1.0 for value in values)
        return {"values": values, "notes": [_UNUSED] if weighted else []}


def _shown(value: SelectedValue, resources: Resources) -> SelectedValue:
    redactor = resources.privacy.redactor
    reason = redactor.value(value["reason"], "reason") if redactor else value["reason"]
    return SelectedValue(**{**value, "name": _shown_name(value), "reason": _JUDGED if reason == REDACTED else reason})


def _shown_name(value: SelectedValue) -> str:
    return "the attribute asked for" if value["id"] == ATTRIBUTE else value["name"]


def _edited(entries: Any, before: list[SelectedValue], taxonomy: Taxonomy) -> list[SelectedValue]:
    """The values a person listed, those selected before as they were but for their weight.

    Raises:
        InputError: What came back is not a list of at least one value, or a weight cannot be used.
        UnknownValueError: It names a value that the taxonomy does not hold.
    """
    if not isinstance(entries, list) or not entries:
        raise InputError(f"A review must come back as a list of at least one value. {_EXPECTED}")
    selected = {value["id"]: value for value in before}
    shown = {_shown_name(value): value["id"] for value in before}
    kept: dict[str, SelectedValue] = {}
    for number, entry in enumerate(entries, 1):
        name, weight = _entry(entry, number)
        name = shown.get(name.strip(), name)
        if name in selected:
            value = selected[name]
        else:
            found = taxonomy.find(name, f"Entry {number} of the review")
            added = SelectedValue(
                id=found.id, name=found.name, family=found.family, source=found.source, score=1.0, reason="added in review", weight=1.0
            )
            value = selected.get(found.id, added)
        if weight is not None:
            value = SelectedValue(**{**value, "weight": weight})
        if kept.setdefault(value["id"], value)["weight"] != value["weight"]:
            raise InputError(f"Entry {number} of the review gives a value another weight than an earlier entry. List each value once.")
    return list(kept.values())


def _entry(entry: Any, number: int) -> tuple[str, float | None]:
    """Id or name of an entry of a review, and its weight where it has one."""
    if isinstance(entry, str):
        return entry, None
    if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), str):
        raise InputError(f"Entry {number} of the review is no value. {_EXPECTED}")
    if not set(entry) <= set(SelectedValue.__annotations__):
        raise InputError(f"Entry {number} of the review has a key that values do not have. {_EXPECTED}")
    weight = entry.get("weight")
    if weight is None:
        return entry["id"], None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or not 0 < weight <= HEAVIEST:
        raise InputError(
            f"The weight of entry {number} of the review must be a number above 0 and at most {HEAVIEST:g}; to drop a value, leave it out."
        )
    return entry["id"], float(weight)
