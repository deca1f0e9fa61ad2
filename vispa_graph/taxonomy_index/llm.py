"""Selection by a chat model: it grades the values, and what it writes is checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from pydantic import BaseModel, Field, StringConstraints, TypeAdapter, ValidationError

from vispa_graph.errors import SelectionError
from vispa_graph.prompts import fence, load_prompt
from vispa_graph.taxonomy_index.calibration import calibrated_score
from vispa_graph.taxonomy_index.index import Hit
from vispa_graph.taxonomy_index.selection import Selected, Selector, considered, in_order
from vispa_graph.taxonomy_index.taxonomy import Taxonomy
from vispa_graph.waiting import Steps, answer_of, run_steps

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

_UNNAMED = "not named by the language model"


class _Grade(BaseModel):
    id: str
    grade: Literal[0, 1, 2]
    reason: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)] = Field(...)


_GRADES = TypeAdapter(list[_Grade])


class LLMSelector:
    """A chat model grades the values 0, 1 or 2; the score is half the grade, and equal grades keep the order of the default selector.

    Args:
        find_llm: Gives the chat model, on first use.
        taxonomy: The values.
        default: Says which values are considered where there are many.
    """

    def __init__(self, find_llm: Callable[[], BaseChatModel], taxonomy: Taxonomy, default: Selector) -> None:
        self._find_llm = find_llm
        self._taxonomy = taxonomy
        self._default = default

    def rank(self, query: str, hits: Sequence[Hit], config: RunnableConfig | None = None) -> list[Selected]:
        """The values considered, best first.

        Raises:
            SelectionError: What the model wrote is no such list, or grades what it was not asked about, or something twice.
        """
        return run_steps(self.judge(query, hits, config))

    def judge(self, query: str, hits: Sequence[Hit], config: RunnableConfig | None = None) -> Steps[list[Selected]]:
        """The same in steps, for sync and async runs."""
        candidates = considered(self._default.rank(query, hits, config))
        listed = "\n".join(f"- {s.value}: {self._taxonomy[s.value].definition}" for s in candidates)
        prompt = load_prompt("rerank_values").render(query=fence(query), values=listed)
        message = yield from answer_of(self._find_llm(), [HumanMessage(prompt)], {**(config or {}), "run_name": "judge"})
        grades = _read_grades(message.text, {s.value for s in candidates})
        judged = []
        for selected in candidates:
            grade = grades.get(selected.value)
            score = calibrated_score("llm", grade.grade / 2 if grade else 0.0)
            judged.append(Selected(selected.value, score, grade.reason if grade else _UNNAMED))
        return in_order(judged)


def _read_grades(text: str, known: set[str]) -> dict[str, _Grade]:
    """The grades by value id."""
    start, end = text.find("["), text.rfind("]")
    try:
        grades = _GRADES.validate_python(json.loads(text[start : end + 1]) if 0 <= start < end else None)
    except (ValueError, ValidationError):
        raise _unreadable("is not a JSON list of values with id, grade (0, 1 or 2) and reason") from None
    found = {grade.id: grade for grade in grades}
    if len(found) < len(grades):
        raise _unreadable("grades a value twice")
    if not set(found) <= known:
        raise _unreadable("grades values that it was not asked about")
    return found


def _unreadable(what: str) -> SelectionError:
    # What the model wrote stays out of the message: it may repeat a patient's words.
    return SelectionError(
        f'The language model was asked which values are at stake, and its answer {what}. Try again, choose a larger model, or reranker="default".'
    )
