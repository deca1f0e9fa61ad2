"""Reading the attribute of a steerable question: a value, right or duty, or a group of people."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

import yaml

# "a nurse", "the elderly", "people from Ghana", "Buddhists ..." speak of people; anything else of a value, a right or a duty.
_GROUP = re.compile(r"(an?|the|people|someone|somebody|those|members?|men|women)\b", re.IGNORECASE)
# "the right to refuse treatment", "a moral duty of care" begin like people but are none.
_CLAIM = re.compile(
    r"(an?|the)\s+([\w-]+\s+)?(rights?|duty|duties|obligations?|responsibilit(y|ies)|values?|virtues?|principles?|freedoms?)\s+(to|of|not|for|from)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Attribute:
    """An attribute as prompts show it.

    Attributes:
        kind: "group" for people, "vrd" for a value, right or duty.
        text: Readable: POLPARTY_Democrat becomes "political party: Democrat".
    """

    kind: Literal["group", "vrd"]
    text: str


def read_attribute(text: str) -> Attribute:
    """Tell groups from values, rights and duties, and spell out OpinionQA's codes."""
    code, _, name = text.partition("_")
    if name and code in _categories():
        return Attribute("group", f"{_categories()[code]}: {name}")
    return Attribute("group" if _GROUP.match(text) and not _CLAIM.match(text) else "vrd", text)


@cache
def _categories() -> dict[str, str]:
    text = (resources.files("vispa_graph.prompts") / "attribute_categories.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))
