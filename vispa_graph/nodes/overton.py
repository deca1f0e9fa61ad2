"""One answer that covers all the perspectives."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig

from vispa_graph.composing import attribute_sentences, telling_sentences
from vispa_graph.conversation import in_context
from vispa_graph.errors import AggregationError
from vispa_graph.passages import cut_note, cut_tokens, incomplete, number_passages
from vispa_graph.prompts import fence, load_prompt
from vispa_graph.resources import Resources
from vispa_graph.state import State, weights
from vispa_graph.tracing import traced
from vispa_graph.waiting import Steps, answer_of


def overton(state: State, config: RunnableConfig, *, resources: Resources) -> Steps[dict[str, Any]]:
    """Summarise the comments with the main language model, or compose an answer of their most telling sentences.

    Raises:
        AggregationError: There is nothing to say: all comments, or the summary, came back empty.
    """
    # What weighs most is told first.
    heavier = weights(state)
    comments = sorted((comment for comment in state["comments"] if comment["text"]), key=lambda comment: -heavier[comment["value"]])
    if not comments:
        raise AggregationError("No comment holds any text, so there is nothing to aggregate. Try a smaller strength or another model.")
    if resources.composes:
        attribution = traced("compose", lambda: telling_sentences(in_context(state), comments, resources.taxonomy, resources.encoder), config)
        names = [", ".join(resources.taxonomy[value].name for value in a["values"]) for a in attribution]
        views = "\n".join(f"- {name}: {a['sentence']}" for name, a in zip(names, attribution, strict=True))
        return {"response": load_prompt("compose_overton").render(views=views), "attribution": attribution, "notes": cut_note(state["comments"])}
    prompt = load_prompt("overton").render(query=fence(in_context(state)), passages=number_passages(comments))
    message = yield from answer_of(resources.summariser, [HumanMessage(prompt)], {**config, "run_name": "summarise"})
    response = message.text.strip()
    if not response:
        raise AggregationError("The main language model returned an empty summary. Try another one, or aggregation='compose'.")
    attribution = attribute_sentences(response, comments, resources.encoder)
    notes = incomplete(message, "summary") + cut_note(state["comments"], {"summary": [cut_tokens(message)]})
    return {"response": response, "attribution": attribution, "notes": notes}
