"""What each steer task gets: the fan-out of a run."""

from __future__ import annotations

import asyncio

from langchain_core.runnables import RunnableConfig
from langgraph.types import Send

from vispa_graph.attributes import ATTRIBUTE, read_attribute
from vispa_graph.conversation import in_context
from vispa_graph.prompts import load_prompt
from vispa_graph.provenance import engine_of
from vispa_graph.resources import Resources
from vispa_graph.settings import Settings
from vispa_graph.state import Mode, State, SteerTask


def makes_comments(mode: Mode, settings: Settings) -> bool:
    """Whether a run in this mode makes comments: a distribution may be read without any."""
    return mode != "distributional" or settings.distribution == "comments"


def one_task_per_value(state: State, config: RunnableConfig, *, resources: Resources) -> list[Send] | str:
    """A steer task for every selected value. All get the same prompt: only the activations differ.

    A distribution that is read without comments needs none.
    """
    if not makes_comments(state["mode"], resources.settings):
        return "distributional"
    attribute = read_attribute(state["attribute"] or "")
    if state["mode"] == "steerable" and attribute.kind == "vrd":
        prompt = load_prompt("comment_attribute").render(attribute=attribute.text, text=in_context(state))
    else:
        prompt = load_prompt("comment").render(text=in_context(state))
    made = resources.made_with | engine_of(resources)

    def task(value: str) -> SteerTask:
        asked = state["attribute"] if value == ATTRIBUTE else None
        return SteerTask(query=state["query"], prompt=prompt, value=value, attribute=asked, mode=state["mode"], made_with=made)

    return [Send("steer", task(selected["id"])) for selected in state["values"]]


async def aone_task_per_value(state: State, config: RunnableConfig, *, resources: Resources) -> list[Send] | str:
    """The same without holding up the event loop while the model loads."""
    return await asyncio.to_thread(one_task_per_value, state, config, resources=resources)
