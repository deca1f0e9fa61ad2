"""Turn what the plural graph gave back into the host's reply."""

from __future__ import annotations

from typing import Any

from prompts import GREETING


def reply(state: dict[str, Any]) -> dict[str, Any]:
    """`response` and `values` were written by the plural graph."""
    heard = ", ".join(value["name"] for value in state["values"])
    return {"reply": f"{GREETING}\n\n{state['response']}\n\n(Values heard: {heard}.)"}
