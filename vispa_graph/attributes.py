"""Reading the attribute of a steerable question: a value, right or duty, or a group of people; and pairs to fit a direction toward it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

import yaml

from vispa_graph.errors import PromptError
from vispa_graph.taxonomy_index.taxonomy import Form, Pair, Value

# The id of the value made of an attribute: no file can give it to one of its own, and it tells nothing of the attribute.
ATTRIBUTE = "@attribute"

# "a nurse", "the elderly", "people from Ghana", "Buddhists ..." speak of people; anything else of a value, a right or a duty.
_GROUP = re.compile(r"(an?|the|people|someone|somebody|those|members?|men|women)\b", re.IGNORECASE)
# "the right to refuse treatment", "a moral duty of care" begin like people but are none.
_CLAIM = re.compile(
    r"(an?|the)\s+([\w-]+\s+)?(rights?|duty|duties|obligations?|responsibilit(y|ies)|values?|virtues?|principles?|freedoms?)\s+(to|of|not|for|from)\b",
    re.IGNORECASE,
)
# Of these, one speaks in a sentence.
_MANY = re.compile(r"(the|people|those|members|men|women)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Attribute:
    """An attribute as prompts show it.

    Attributes:
        kind: "group" for people, "vrd" for a value, right or duty.
        text: Readable: POLPARTY_Democrat becomes "political party: Democrat".
        noun: As it stands in a sentence: "someone whose political party is Democrat".
    """

    kind: Literal["group", "vrd"]
    text: str
    noun: str


def read_attribute(text: str) -> Attribute:
    """Tell groups from values, rights and duties, and spell out OpinionQA's codes."""
    code, _, name = text.partition("_")
    if name and code in _categories():
        return Attribute("group", f"{_categories()[code]}: {name}", f"someone whose {_categories()[code]} is {name}")
    if not _GROUP.match(text) or _CLAIM.match(text):
        return Attribute("vrd", text, text)
    return Attribute("group", text, f"one of {text}" if _MANY.match(text) else text)


def attribute_value(text: str) -> Value:
    """The attribute as a value that can be steered to: contrastive pairs from the templates of its kind.

    A positive twin speaks as one of the group, or acts for the value, right or duty; in its negative twin nobody in particular does, or
    it is set aside.
    """
    attribute = read_attribute(text)

    def filled(template: str) -> str:
        sentence = template.replace("{attribute}", attribute.noun)
        return sentence[0].upper() + sentence[1:]

    pairs = {form: tuple(Pair(filled(p), filled(n)) for p, n in twins) for form, twins in _templates(attribute.kind).items()}
    return Value(
        id=ATTRIBUTE,
        name=attribute.text,
        family="attribute",
        source="contrastive pairs made from templates",
        definition=attribute.noun,
        facets=(attribute.text,),
        pairs=pairs,
    )


@cache
def _templates(kind: str) -> dict[Form, list[tuple[str, str]]]:
    """Pairs of templates by form; every positive one names the attribute."""
    name = f"attribute_{kind}.yaml"
    forms = yaml.safe_load((resources.files("vispa_graph.prompts") / name).read_text(encoding="utf-8"))
    templates: dict[Form, list[tuple[str, str]]] = {}
    for form, twins in forms.items():
        templates[form] = [(pair["positive"], pair["negative"]) for pair in twins]
        if not all("{attribute}" in positive for positive, _ in templates[form]):
            raise PromptError(f"prompts/{name}: a positive template under {form!r} lacks {{attribute}}. Mend the file.")
    return templates


@cache
def _categories() -> dict[str, str]:
    text = (resources.files("vispa_graph.prompts") / "attribute_categories.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))
