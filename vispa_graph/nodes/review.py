"""Stop for a person to edit the values before any comment is made."""

from __future__ import annotations

from typing import Any

from langgraph.types import interrupt

from vispa_graph.errors import InputError
from vispa_graph.resources import Resources
from vispa_graph.state import SelectedValue, State


def review(state: State, *, resources: Resources) -> dict[str, Any]:
    """Interrupt with the selected values; resume with a list of ids or names, in the order they are to be heard.

    The node runs again from its top when the run is resumed, so nothing before the interrupt has an effect.

    Raises:
        InputError: What came back is not a list of at least one value.
        UnknownValueError: It names a value that the taxonomy does not hold.
    """
    edited = interrupt({"query": state["query"], "values": state["values"]})
    if not isinstance(edited, list) or not edited or not all(isinstance(name, str) for name in edited):
        raise InputError("A review must come back as a list of at least one value id or name. Resume with such a list.")
    before = {selected["id"]: selected for selected in state["values"]}
    kept: dict[str, SelectedValue] = {}
    for name in edited:
        value = resources.taxonomy[name]
        added = SelectedValue(id=value.id, name=value.name, family=value.family, source=value.source, score=1.0, reason="added in review")
        kept[value.id] = before.get(value.id, added)
    return {"values": list(kept.values())}
