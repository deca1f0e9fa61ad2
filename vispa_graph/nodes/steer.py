"""Let the model comment while its activations are steered toward one value. Runs once per value, all at the same time."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.config import get_stream_writer

from vispa_graph.attributes import ATTRIBUTE, attribute_value
from vispa_graph.chat_model import SteeredChatModel
from vispa_graph.engine.contract import Direction, Steering
from vispa_graph.provenance import refuse_other_settings
from vispa_graph.resources import Resources
from vispa_graph.state import Comment, SteeringFacts, SteerTask
from vispa_graph.taxonomy_index import Value
from vispa_graph.waiting import Steps, answer_of


def steer(task: SteerTask, config: RunnableConfig, *, resources: Resources) -> Steps[dict[str, Any]]:
    """One comment; the engine batches the tasks of a step into one forward pass.

    Raises:
        ResumeError: The task belongs to a run that was begun with other settings or models.
    """
    model = _model(task, resources)
    message = yield from answer_of(model, [HumanMessage(task["prompt"])], _labelled(task, model, config, resources))
    return _finish(task, model, message, resources)


def _model(task: SteerTask, resources: Resources) -> SteeredChatModel:
    refuse_other_settings(task["made_with"], resources)
    if task["value"] != ATTRIBUTE:
        return resources.chat_model.for_value(task["value"])
    return resources.chat_model.model_copy(update={"steering": resources.attribute_steering(task["attribute"] or "")})


def _labelled(task: SteerTask, model: SteeredChatModel, config: RunnableConfig, resources: Resources) -> RunnableConfig:
    """The run's configuration with a stable name, tags and facts for viewers; never any user text."""
    steering = model.steering
    facts: dict[str, Any] = {
        "value": task["value"],
        "family": ATTRIBUTE if task["value"] == ATTRIBUTE else resources.taxonomy[task["value"]].family,
        "mode": task["mode"],
        "method": resources.method,
    }
    if steering:
        facts |= {"layers": list(steering.direction.layers), "strength": steering.strength, "target_probability": steering.target_probability}
    tags = [*config.get("tags", []), f"mode:{task['mode']}", f"method:{resources.method}"]
    labels: RunnableConfig = {
        "run_name": f"steer {task['value']}",
        "tags": list(dict.fromkeys(tags)),
        "metadata": {**config.get("metadata", {}), **facts, "seed": model.seed},
    }
    return {**config, **labels}


def _facts(steering: Steering | None, report: dict[str, Any] | None) -> SteeringFacts | None:
    if steering is None or report is None:
        return None
    return SteeringFacts(
        method=steering.method,
        layers=report["layers"],
        magnitude=report["magnitude"],
        before=report["before"],
        after=report["after"],
        displacement=report["displacement"],
    )


def _finish(task: SteerTask, model: SteeredChatModel, message: AIMessage, resources: Resources) -> dict[str, Any]:
    own = task["value"] == ATTRIBUTE
    value = attribute_value(task["attribute"] or "") if own else resources.taxonomy[task["value"]]
    facts = message.response_metadata
    comment = Comment(
        value=value.id,
        name=value.name,
        text=message.text.strip(),
        finish=facts["finish_reason"],
        tokens=message.usage_metadata["output_tokens"] if message.usage_metadata else 0,
        cut_tokens=facts["cut_tokens"],
        steering=_facts(model.steering, facts["steering"]),
    )
    get_stream_writer()({"step": "comment", "value": value.id, "tokens": comment["tokens"]})
    notes = [_fitted(value, model.steering.direction)] if own and model.steering else []
    if model.steering and model.steering.strength and comment["steering"] and not any(comment["steering"]["magnitude"]):
        leans = "toward" if model.steering.strength > 0 else "away from"
        notes.append(f"The model leans {leans} {value.name} here by itself: steering added nothing, and the comment is the unsteered one.")
    if not comment["text"]:
        notes.append(f"The model had nothing to say from {value.name}.")
    return {"comments": [comment], "notes": notes, "made_with": task["made_with"]}


def _fitted(value: Value, direction: Direction) -> str:
    """What the reader must know of a direction that was fitted for an attribute."""
    from vispa_graph.engine.directions import separates

    note = f"The taxonomy holds no such attribute, so a direction toward {value.name} was fitted on {len(value.all_pairs)} pairs made from templates."
    if direction.held_out is not None:
        note += f" It tells {direction.held_out.mean():.0%} of the sentences held out apart (50% is chance)."
    return note if separates(direction) else f"{note} That is too little for an answer to rest on its comment."
