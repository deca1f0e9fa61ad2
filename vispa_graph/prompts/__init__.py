"""The prompts, one file each, and their loader.

Text that comes from users or models is data: `fence` keeps it from closing the tags it stands in.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from functools import cache
from importlib import resources

from vispa_graph.errors import PromptError

# Each prompt and the placeholders its file must have: no more, no fewer.
PLACEHOLDERS: dict[str, frozenset[str]] = {
    "comment": frozenset({"text"}),
    "comment_attribute": frozenset({"attribute", "text"}),
    "population": frozenset({"population"}),
    "score_options": frozenset({"passage", "query", "options"}),
    "score_options_direct": frozenset({"query", "options"}),
    "rerank_values": frozenset({"query", "values"}),
    "overton": frozenset({"query", "passages"}),
    "steerable_choose": frozenset({"query", "passages", "attribute"}),
    "compose_overton": frozenset({"views"}),
    "steerable_answer": frozenset({"query", "passage", "attribute"}),
}

_TAG = re.compile(r"<(?=[\s/]*(?:situation|passages?|question|attribute)\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """A prompt with named placeholders."""

    name: str
    template: str

    def render(self, **data: str) -> str:
        """The prompt with its placeholders filled; what is filled in is never read as a template.

        Raises:
            PromptError: A placeholder is missing or unknown.
        """
        if set(data) != PLACEHOLDERS[self.name]:
            expected = ", ".join(sorted(PLACEHOLDERS[self.name]))
            raise PromptError(f"Prompt {self.name!r} was given {sorted(data)}; it needs exactly: {expected}.")
        return self.template.format_map(data)


@cache
def load_prompt(name: str) -> Prompt:
    """Read a prompt from its file and check its placeholders.

    Raises:
        PromptError: There is no such prompt, or its placeholders are not those of `PLACEHOLDERS`.
    """
    if name not in PLACEHOLDERS:
        raise PromptError(f"There is no prompt {name!r}. Choose one of: {', '.join(sorted(PLACEHOLDERS))}.")
    template = (resources.files(__name__) / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")
    found = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    if found != PLACEHOLDERS[name]:
        raise PromptError(
            f"prompts/{name}.txt has the placeholders {sorted(found)}, but the code fills {sorted(PLACEHOLDERS[name])}. "
            "Mend the file so that the two agree."
        )
    return Prompt(name, template)


def fence(text: str) -> str:
    """The text with every opening or closing of one of our tags made harmless."""
    return _TAG.sub("&lt;", text)
