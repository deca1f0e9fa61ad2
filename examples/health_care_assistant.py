"""A health-care assistant with two tools: it looks facts up, and asks us where people disagree because of what they value.

    python examples/health_care_assistant.py
    python examples/health_care_assistant.py --model anthropic:claude-sonnet-4-5 "May my father refuse the operation?"

Needs `pip install langchain`. Without --model the assistant's own language model is scripted, so that everything runs without a network.
With it, any chat model that calls tools decides for itself (pip install langchain-anthropic for the one above): it then receives the
conversation. The medicines and recommendations below are invented for this example. None of them exists; none of this is medical advice.
"""

from __future__ import annotations

import argparse
import re
import sqlite3
from collections.abc import Sequence
from typing import Any

from langchain.agents import create_agent
from langchain.chat_models import init_chat_model
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import BaseTool, tool
from langgraph.graph.state import CompiledStateGraph

from vispa_graph import PluralGraph, as_tool, create_graph

INSTRUCTIONS = """You assist people with questions about health care.
Use look_up for facts: what a medicine is for, its doses and cautions, what a guideline recommends. Never give a fact it does not hold.
Use plural_answer for value questions: where the facts would not settle it, because reasonable people want different things, as on consent,
truth-telling, the end of life, or duties in a family. Many questions need both. You never decide for the person, and never give medical advice:
say that a doctor who knows the case must be asked."""

INVENTED = [
    ("medicine", "velotrin", "Velotrin lowers blood pressure. Usual dose 10 mg a day, above 75 years 5 mg. Not together with marasul."),
    ("medicine", "marasul", "Marasul eases strong pain. Usual dose 20 mg every 8 hours. It makes drowsy and may slow the breath."),
    ("medicine", "quessamine", "Quessamine slows memory loss a little in some people. Usual dose 4 mg a day. Trial of three months, then review."),
    (
        "guideline",
        "hip operation",
        "After a broken hip, operate within 48 hours if the person agrees. Above 80 years, one in ten has a serious complication.",
    ),
    ("guideline", "tube feeding", "In advanced dementia, tube feeding does not lengthen life. Offer careful feeding by hand instead."),
]

# What the scripted model does with the questions of the demonstration: which tools it calls, in one go.
LOOK_UP, ASK = "look_up", "plural_answer"
SCRIPT: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "What is the usual dose of velotrin at 84?": [(LOOK_UP, {"words": "velotrin dose"})],
    "Should my father, 84, have an operation he does not want?": [
        (ASK, {"query": "Should my father, 84, have an operation he does not want?"}),
    ],
    "My mother has advanced dementia and no longer eats. Should she be fed by tube?": [
        (LOOK_UP, {"words": "tube feeding dementia"}),
        (ASK, {"query": "My mother has advanced dementia and no longer eats. Should she be fed by tube?", "options": ["Yes", "No", "It depends"]}),
    ],
}


def make_look_up() -> BaseTool:
    """The look-up in a small formulary and guideline base, on SQLite's full-text index."""
    base = sqlite3.connect(":memory:", check_same_thread=False)
    base.execute("create virtual table facts using fts5(kind, title, text, tokenize='porter')")
    base.executemany("insert into facts values (?, ?, ?)", INVENTED)

    @tool
    def look_up(words: str) -> str:
        """Facts from the house's formulary and guidelines: what a medicine is for, doses, cautions, recommendations. Give a few key words."""
        query = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", words))
        if not query:
            return "Give at least one word to look up."
        rows = base.execute("select kind, title, text from facts where facts match ? order by rank limit 2", [query]).fetchall()
        return "\n".join(f"[{kind}: {title}] {text}" for kind, title, text in rows) or "The formulary and guidelines hold nothing on this."

    return look_up


class ScriptedModel(BaseChatModel):
    """Calls the tools that `SCRIPT` has for a question, then quotes what they said."""

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> BaseChatModel:
        """The script knows its tools already."""
        return self

    def _generate(self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        asked = max(number for number, message in enumerate(messages) if isinstance(message, HumanMessage))
        found = {message.name: message.text for message in messages[asked:] if isinstance(message, ToolMessage)}
        if not found:
            planned = SCRIPT.get(messages[asked].text)
            if planned is None:
                said = AIMessage("I am scripted and know three questions only. Name a real model with --model.")
            else:
                calls = [{"name": name, "args": arguments, "id": f"{name}-{asked}"} for name, arguments in planned]
                said = AIMessage("", tool_calls=calls)
        else:
            parts = {LOOK_UP: "What our records say: ", ASK: "How people who hold different values see it: "}
            told = "\n".join(f"{parts[name or '']}{text}" for name, text in found.items())
            said = AIMessage(f"{told}\nPlease talk to a doctor who knows the case; I cannot advise you.")
        return ChatResult(generations=[ChatGeneration(message=said)])


def make_assistant(graph: PluralGraph, model: str | BaseChatModel | None = None) -> CompiledStateGraph[Any, Any, Any, Any]:
    """The agent: scripted, or on a chat model or the name of one, such as "anthropic:claude-sonnet-4-5"."""
    chosen = ScriptedModel() if model is None else init_chat_model(model) if isinstance(model, str) else model
    return create_agent(chosen, tools=[make_look_up(), as_tool(graph)], system_prompt=INSTRUCTIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description="A health-care assistant that looks facts up and hears values.")
    parser.add_argument("question", nargs="*", help="instead of the demonstration's three")
    parser.add_argument("--model", help="the assistant's own chat model, such as anthropic:claude-sonnet-4-5; scripted if left out")
    given = parser.parse_args()
    graph = create_graph()
    try:
        assistant = make_assistant(graph, given.model)
    except (ValueError, ImportError) as error:  # no such provider, or its package is not installed
        parser.error(f"{given.model}: {error}")
    print("All medicines and recommendations here are invented.")
    for question in given.question or SCRIPT:
        print(f"\n=== {question}")
        for message in assistant.invoke({"messages": [{"role": "user", "content": question}]})["messages"]:
            for call in getattr(message, "tool_calls", []):
                print(f"--- calls {call['name']}")
        print(message.text)
    graph.close()


if __name__ == "__main__":
    main()
