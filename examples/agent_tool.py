"""The graph as a tool of a LangChain agent. Needs `pip install langchain`.

    python examples/agent_tool.py

The agent's own model is scripted, so that this runs without a network: it calls the tool, then quotes what came back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage

from vispa_graph import as_tool, create_graph

QUESTION = "My mother has dementia and no longer eats. Should she be fed by tube?"


class ScriptedModel(GenericFakeChatModel):
    """Says what it was told to say, whatever tools it is given."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> BaseChatModel:
        """The script knows its tools already."""
        return self


def script() -> Iterator[AIMessage]:
    # The first call leaves out the options that its mode needs: the tool says so, and the agent mends it.
    yield calling({"query": QUESTION, "mode": "distributional"}, "first")
    yield calling({"query": QUESTION}, "second")
    yield AIMessage("People see this differently; the tool's answer above says how. Please talk to her doctors about her own case.")


def calling(arguments: dict[str, Any], call_id: str) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": "plural_answer", "args": arguments, "id": call_id}])


def main() -> None:
    graph = create_graph()
    model = ScriptedModel(messages=script())
    # A real one: model = "anthropic:claude-sonnet-4-5" (pip install langchain-anthropic), or any LangChain chat model that calls tools.
    agent = create_agent(model, tools=[as_tool(graph)], system_prompt="Use plural_answer where people disagree because of what they value.")
    result = agent.invoke({"messages": [{"role": "user", "content": QUESTION}]})
    for message in result["messages"]:
        print(f"--- {message.type}")
        for call in getattr(message, "tool_calls", []):
            print(f"calls {call['name']}({call['args']})")
        if message.text:
            print(message.text)
        if isinstance(message, ToolMessage) and message.artifact:
            # The model reads the text; the host has the whole output beside it.
            print("artifact:", ", ".join(sorted(message.artifact)))
    graph.close()


if __name__ == "__main__":
    main()
