"""The graph as a LangChain tool for other people's agents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, ToolException
from pydantic import BaseModel, ConfigDict, Field

from vispa_graph.errors import VispaError
from vispa_graph.plural_graph import PluralGraph
from vispa_graph.privacy import PrivateTool
from vispa_graph.state import Input, Mode, Output

DESCRIPTION = (
    "Answers a value-laden question plurally: what people who hold different values would say about it. Use it when reasonable people "
    "disagree because they care about different things, for example on consent, end of life, or duties in a family; not for facts. "
    "It gives perspectives, not medical or legal advice."
)


class Arguments(BaseModel):
    """What an agent gives."""

    model_config = ConfigDict(extra="forbid")

    query: str = Field(min_length=1, description="The question or situation, in full: the tool sees nothing else.")
    mode: Mode | None = Field(
        None,
        description="overton: all perspectives; steerable: one attribute's; distributional: a probability per option. Leave out to decide by the other arguments.",
    )
    attribute: str | None = Field(None, description="Whom to speak for: a value, right, duty or group.")
    population: str | None = Field(None, description="Whose distribution of answers is asked for, such as a country.")
    options: list[str] | None = Field(None, description="2 to 26 answers to choose between.")
    values: list[str] | None = Field(None, description="Values to hear; leave out to have them selected.")


def as_tool(graph: PluralGraph, *, name: str = "plural_answer", description: str = DESCRIPTION) -> BaseTool:
    """A tool, sync and async, that runs the graph inside the caller's run.

    Its content is the answer as text; its artifact the whole output. Bad arguments come back to the agent as a message it can read.
    """

    # An agent that gives text alone gives the question.
    def run(query: str, *, config: RunnableConfig, **arguments: Any) -> tuple[str, dict[str, Any]]:
        try:
            return _result(graph.invoke(cast(Input, {"query": query, **arguments}), config))
        except VispaError as error:
            raise ToolException(str(error)) from error

    async def arun(query: str, *, config: RunnableConfig, **arguments: Any) -> tuple[str, dict[str, Any]]:
        try:
            return _result(await graph.ainvoke(cast(Input, {"query": query, **arguments}), config))
        except VispaError as error:
            raise ToolException(str(error)) from error

    return PrivateTool.from_function(
        privacy=graph.resources.privacy,
        func=run,
        coroutine=arun,
        name=name,
        description=description,
        args_schema=Arguments,
        response_format="content_and_artifact",
        handle_tool_error=True,
        handle_validation_error=explain_arguments,
    )


def _result(output: Any) -> tuple[str, dict[str, Any]]:
    if "__interrupt__" in output:
        raise ToolException("The run has stopped for a person to review the values. It goes on where the graph is resumed.")
    found: Output = output
    return answer_text(found), dict(found)


def answer_text(output: Output) -> str:
    """An output as an agent reads it: the answer, the values heard, and the notes."""
    heard = ", ".join(value["name"] for value in output["values"])
    notes = "".join(f"\nNote: {note}" for note in output["notes"])
    return f"{output['response']}\n\nValues heard: {heard}.{notes}"


def explain_arguments(error: Any) -> str:
    """What is wrong with the arguments, without repeating what they held."""
    if not hasattr(error, "errors"):
        return "The arguments do not fit the tool's schema."
    problems = dict.fromkeys(_problem(problem) for problem in error.errors())
    return f"The arguments do not fit: {'; '.join(problems)}."


def _problem(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":  # a name that the caller made up may be a person's words
        return f"there are arguments that are not known; known are {', '.join(Arguments.model_fields)}"
    return f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
