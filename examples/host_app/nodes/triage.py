"""Turn the message that came in into what the plural graph reads."""

from __future__ import annotations

from typing import Any


def triage(state: dict[str, Any]) -> dict[str, Any]:
    """`query`, `options` and the like are the plural graph's input keys; it leaves the host's other keys alone."""
    return {"query": state["message"].strip(), "mode": "overton"}
