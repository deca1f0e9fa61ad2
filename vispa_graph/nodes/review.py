"""Stop for a person to edit the values before any comment is made."""

from __future__ import annotations

from typing import Any

from langgraph.types import interrupt

from vispa_graph.attributes import ATTRIBUTE
from vispa_graph.errors import InputError
from vispa_graph.resources import Resources
from vispa_graph.state import SelectedValue, State
from vispa_graph.taxonomy_index import Taxonomy


def review(state: State, *, resources: Resources) -> dict[str, Any]:
    """Interrupt with the selected values; resume with a list of ids or names, in the order they are to be heard.

    What cannot be used is refused by interrupting again, with the reason under `problem`: a run that failed on a resume value
    would be given the same value by every later resume. The node runs again from its top each time, so nothing before the
    interrupt has an effect.
    """
    shown: dict[str, Any] = {"query": state["query"], "values": state["values"]}
    while True:
        edited = interrupt(shown)
        try:
            return {"values": _edited(edited, state["values"], resources.taxonomy)}
        except InputError as error:
            shown = {**shown, "problem": str(error)}


def _edited(names: Any, before: list[SelectedValue], taxonomy: Taxonomy) -> list[SelectedValue]:
    """The values a person named, those selected before as they were.

    Raises:
        InputError: What came back is not a list of at least one value.
        UnknownValueError: It names a value that the taxonomy does not hold.
    """
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError("A review must come back as a list of at least one value id or name. Resume with such a list.")
    selected = {value["id"]: value for value in before}
    kept: dict[str, SelectedValue] = {}
    for name in names:
        if name == ATTRIBUTE and name in selected:  # stands in no taxonomy
            kept[name] = selected[name]
            continue
        value = taxonomy[name]
        added = SelectedValue(id=value.id, name=value.name, family=value.family, source=value.source, score=1.0, reason="added in review")
        kept[value.id] = selected.get(value.id, added)
    return list(kept.values())
