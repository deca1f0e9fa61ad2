"""Let the model comment while its activations are steered toward one value. Runs once per value, all at the same time."""

from __future__ import annotations

import asyncio
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.config import get_stream_writer

from vispa_graph.chat_model import SteeredChatModel
from vispa_graph.engine.contract import Steering
from vispa_graph.provenance import refuse_other_settings
from vispa_graph.resources import Resources
from vispa_graph.state import Comment, SteeringFacts, SteerTask


def steer(task: SteerTask, config: RunnableConfig, *, resources: Resources) -> dict[str, Any]:
    """One comment; the engine batches the tasks of a step into one forward pass.

    Raises:
        ResumeError: The task belongs to a run that was begun with other settings or models.
    """
    model = _model(task, resources)
    return _finish(task, model, model.invoke([HumanMessage(task["prompt"])], _labelled(task, model, config)), resources)


async def asteer(task: SteerTask, config: RunnableConfig, *, resources: Resources) -> dict[str, Any]:
    """The same without holding a thread while the engine works."""
    # Loading a model or fitting directions must not hold up the event loop.
    model = await asyncio.to_thread(_model, task, resources)
    return _finish(task, model, await model.ainvoke([HumanMessage(task["prompt"])], _labelled(task, model, config)), resources)


def _model(task: SteerTask, resources: Resources) -> SteeredChatModel:
    refuse_other_settings(task["made_with"], resources)
    return resources.chat_model.for_value(task["value"])


def _labelled(task: SteerTask, model: SteeredChatModel, config: RunnableConfig) -> RunnableConfig:
    """The run's configuration with a stable name and tags for viewers; never any user text."""
    method = model.steering.direction.method if model.steering else "unsteered"
    labels: RunnableConfig = {
        "run_name": f"steer {task['value']}",
        "tags": [*config.get("tags", []), f"mode:{task['mode']}", f"method:{method}"],
        "metadata": {**config.get("metadata", {}), "value": task["value"]},
    }
    return {**config, **labels}


def _facts(steering: Steering | None, report: dict[str, Any] | None) -> SteeringFacts | None:
    if steering is None or report is None:
        return None
    return SteeringFacts(
        method=steering.direction.method,
        layers=report["layers"],
        magnitude=report["magnitude"],
        before=report["before"],
        after=report["after"],
        displacement=report["displacement"],
    )


def _finish(task: SteerTask, model: SteeredChatModel, message: AIMessage, resources: Resources) -> dict[str, Any]:
    value = resources.taxonomy[task["value"]]
    facts = message.response_metadata
    comment = Comment(
        value=value.id,
        name=value.name,
        text=message.text.strip(),
        finish=facts["finish_reason"],
        tokens=message.usage_metadata["output_tokens"] if message.usage_metadata else 0,
        steering=_facts(model.steering, facts["steering"]),
    )
    get_stream_writer()({"step": "comment", "value": value.id, "tokens": comment["tokens"]})
    notes = []
    if facts["cut_tokens"]:
        notes.append(
            f"The text was too long for the model's context: {facts['cut_tokens']} tokens in its middle were left out of the comment from {value.name}."
        )
    if not comment["text"]:
        notes.append(f"The model had nothing to say from {value.name}.")
    return {"comments": [comment], "notes": notes, "made_with": task["made_with"]}
