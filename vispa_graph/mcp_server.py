"""The graph as an MCP server: over stdio, or over HTTP on this machine alone behind a token.

Nothing but protocol goes to stdout, and no log holds what was asked or said.
"""

from __future__ import annotations

import difflib
import hmac
import os
import socket
import sys
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, InputRequiredResult, TextContent, Tool
from pydantic import Field, ValidationError

from vispa_graph import __version__
from vispa_graph.errors import SettingsError, VispaError
from vispa_graph.graph import create_graph
from vispa_graph.plural_graph import PluralGraph
from vispa_graph.resources import Resources
from vispa_graph.select import select_values
from vispa_graph.state import Input, Mode, Output, State, check_input
from vispa_graph.tasks import makes_comments
from vispa_graph.tool import DESCRIPTION, answer_text, explain_arguments

HOST = "127.0.0.1"
PATH = "/mcp"
# Largest request over HTTP, in bytes; a question has at most a tenth of it.
LARGEST_REQUEST = 256 * 1024
LONGEST_QUERY = 20_000
# Runs that can still be explained or followed up; older ones are forgotten.
RUNS_KEPT = 100

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

Query = Annotated[str, Field(min_length=1, max_length=LONGEST_QUERY, description="The question or situation, in full.")]
Text = Annotated[str, Field(max_length=1000)]
Texts = Annotated[list[Text], Field(max_length=100)]


class Runs:
    """The graph with a memory of its last runs; a run is a thread, so that it can be followed up."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self._saver = InMemorySaver()
        self.graph = create_graph(resources=resources, checkpointer=self._saver)
        self._known: OrderedDict[str, None] = OrderedDict()
        self._busy: set[str] = set()

    @asynccontextmanager
    async def turn(self, run: str | None) -> AsyncIterator[tuple[str, RunnableConfig]]:
        """Id and configuration of a new run, or of the next turn of an earlier one. One turn of a run at a time.

        A new run whose turn fails is forgotten: nobody was told its id, and it must not push out one that was answered.

        Raises:
            ToolError: There is no such run, or a turn of it is being answered.
        """
        begins = run is None
        if run is None:
            run = uuid.uuid4().hex
            self._known[run] = None
        config = self._config(run)
        if run in self._busy:
            raise ToolError("An earlier question of this run is still being answered. Wait for it, or leave 'run' out to begin another.")
        self._busy.add(run)
        try:
            yield run, config
        except BaseException:
            if begins:
                self._forget(run)
            raise
        finally:
            self._busy.discard(run)
            if run in self._known:
                self._known.move_to_end(run)
            for oldest in [known for known in self._known if known not in self._busy][: max(0, len(self._known) - RUNS_KEPT)]:
                self._forget(oldest)

    def _forget(self, run: str) -> None:
        del self._known[run]
        self._saver.delete_thread(run)

    def state(self, run: str) -> State:
        """The newest turn of a run that was answered.

        Raises:
            ToolError: There is no such run, or it was never answered.
        """
        # A turn that has just begun, or failed, may still hold the response of the one before it: only what has ended counts.
        for snapshot in self.graph.get_state_history(self._config(run)):
            if not snapshot.next and snapshot.values.get("response"):
                return cast(State, snapshot.values)
        raise ToolError("This run has no answer: it failed, or is still being made.")

    def _config(self, run: str) -> RunnableConfig:
        if run not in self._known:
            raise ToolError(f"There is no such run. The last {RUNS_KEPT} runs of this server are kept; 'ask' gives their ids.")
        return {"configurable": {"thread_id": run}}


class Server(MCPServer[Any]):
    """An MCP server that takes no arguments but its tools' own, and says what is wrong with them without repeating what they hold."""

    async def list_tools(self) -> list[Tool]:
        """As in the SDK, but that the schemas allow no other arguments."""
        tools = await super().list_tools()
        return [tool.model_copy(update={"input_schema": {**tool.input_schema, "additionalProperties": False}}) for tool in tools]

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None) -> CallToolResult | InputRequiredResult:
        """As in the SDK, but for arguments that the tool does not have, which the SDK drops, and for the message."""
        for tool in await self.list_tools():
            known = list(tool.input_schema["properties"])
            if tool.name == name and (unknown := [argument for argument in arguments if argument not in known]):
                raise ToolError(_explain_unknown(unknown, known))
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            if isinstance(error.__cause__, ValidationError):
                raise ToolError(explain_arguments(error.__cause__)) from None
            raise


def create_server(resources: Resources) -> MCPServer[Any]:
    """A server with three tools: ask, list_values and explain_run."""
    runs = Runs(resources)
    server = Server("vispa", version=__version__, instructions=DESCRIPTION, log_level="WARNING")

    @server.tool(description=f"{DESCRIPTION} Gives the id of the run, for follow-up questions and for explain_run.")
    async def ask(
        context: Context[Any, Any],
        query: Query,
        mode: Annotated[Mode | None, Field(description="Leave out to decide by the other arguments.")] = None,
        attribute: Annotated[Text | None, Field(description="Whom to speak for: a value, right, duty or group.")] = None,
        population: Annotated[Text | None, Field(description="Whose distribution of answers is asked for, such as a country.")] = None,
        options: Annotated[Texts | None, Field(description="2 to 26 answers to choose between.")] = None,
        values: Annotated[Texts | None, Field(description="Values to hear; leave out to have them selected.")] = None,
        run: Annotated[Text | None, Field(description="Id of an earlier run that this question follows up.")] = None,
    ) -> CallToolResult:
        given: dict[str, Any] = {"query": query, "mode": mode, "attribute": attribute, "population": population, "options": options, "values": values}
        with _told():
            async with runs.turn(run) as (run_id, config):
                output = await _follow(runs.graph, cast(Input, given), config, context)
        return _result(f"{answer_text(output)}\n\nRun: {run_id}", {"run": run_id, **output})

    @server.tool(description="The values that can be heard, or those that a text puts at stake, with scores and reasons. Loads no language model.")
    def list_values(
        query: Annotated[Query | None, Field(description="A question or situation; leave out to list all values.")] = None,
    ) -> CallToolResult:
        taxonomy = resources.taxonomy
        with _told():
            if query is None:
                found: list[dict[str, Any]] = [
                    {"id": v.id, "name": v.name, "family": v.family, "source": v.source, "definition": v.definition} for v in taxonomy
                ]
                text = "\n".join(f"{v['id']} ({v['family']}): {v['definition']}" for v in found)
            else:
                selected = select_values(query, resources.settings.top_k, resources=resources)
                found = [{"id": s.value, "name": taxonomy[s.value].name, "score": s.score, "reason": s.reason} for s in selected]
                text = "\n".join(f"{v['id']} ({v['score']:.2f}): {v['reason']}" for v in found)
        return _result(text, {"values": found})

    @server.tool(
        description="Why a run answered as it did: which values were heard and why, what steering did to each comment, what the answer rests on."
    )
    def explain_run(run: Annotated[Text, Field(description="Id of the run, from ask.")]) -> CallToolResult:
        with _told():
            state = runs.state(run)
            facts = {key: state[key] for key in ("turns", "made_with", *Output.__annotations__)}  # type: ignore[literal-required]
            return _result(explain(state), {"run": run, **facts})

    return server


def explain(state: State) -> str:
    """An answered run in words: the values and their reasons, what steering did, what the answer rests on."""
    lines = [f"Mode: {state['mode']}. Model: {state['made_with']['model']}.", "", "Values heard:"]
    lines += [f"- {v['name']} (score {v['score']:.2f}, weight {v['weight']:g}): {v['reason']}" for v in state["values"]]
    lines += ["", "What steering did:"]
    for comment in state["comments"]:
        facts = comment["steering"]
        if facts is None:
            lines.append(f"- {comment['name']}: not steered")
            continue
        moved = (
            f", probability of the value {facts['before'][-1]:.3f} before and {facts['after'][-1]:.3f} after"
            if facts["before"] and facts["after"]
            else ""
        )
        lines.append(
            f"- {comment['name']}: {facts['method']}, {len(facts['layers'])} blocks, displaced by {facts['displacement']:.1%} of the state{moved}"
        )
    if state["chosen"]:
        lines += ["", f"The answer rests on the comment from {state['chosen']['value']}: {state['chosen']['reason']}."]
    resting = [part for part in state["attribution"] if part["values"]]
    if resting:
        lines += ["", "What each sentence rests on:", *(f"- {part['sentence']} ({', '.join(part['values'])})" for part in resting)]
    lines += [f"Note: {note}" for note in state["notes"]]
    return "\n".join(lines)


def serve_stdio(server: MCPServer[Any]) -> None:
    """Serve until stdin ends. Whatever else prints ends up on stderr."""
    try:
        server.run("stdio")
    finally:
        _flush_to_stderr()


def _flush_to_stderr() -> None:
    """What was printed while serving and is not written yet must not follow the protocol when the process ends."""
    stdout = os.dup(1)
    try:
        os.dup2(2, 1)
        sys.stdout.flush()
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def serve_http(server: MCPServer[Any], port: int, token: str, ready: Callable[[str], None]) -> None:
    """Serve on the loopback interface to whoever has the token, until the process is stopped.

    Args:
        port: 0 for any free one.
        ready: Called with the server's URL once it takes connections.

    Raises:
        SettingsError: The port is taken, or kept for others.
    """
    import uvicorn

    app = Guarded(server.streamable_http_app(streamable_http_path=PATH, host=HOST, max_request_body_size=LARGEST_REQUEST), token)
    with _listen(port) as listening:
        ready(f"http://{HOST}:{listening.getsockname()[1]}{PATH}")
        # uvicorn's own logging configuration would write to stdout.
        uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on")).run(sockets=[listening])


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise SettingsError(f"Port {port} cannot be served on: {reason}. Choose another one, or 0 for any that is free.") from error


class Guarded:
    """An ASGI application that answers only requests with the right bearer token."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        given = dict(scope.get("headers") or ()).get(b"authorization", b"")
        if scope["type"] == "http" and not hmac.compare_digest(given, self._expected):
            headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b"Wrong or missing token. Send it as 'Authorization: Bearer TOKEN'."})
            return
        await self._app(scope, receive, send)


async def _follow(graph: PluralGraph, given: Input, config: RunnableConfig, context: Context[Any, Any]) -> Output:
    """The output of a run, its steps reported as progress; their messages hold no text of the user."""
    output: Any = None
    done, total = 0, None
    comments = makes_comments(check_input(given)["mode"], graph.resources.settings)
    await context.report_progress(0, None, "selecting values")
    async for kind, part in graph.astream(given, config, stream_mode=["updates", "custom", "values"], output_keys=graph.output_channels):
        if kind == "values":
            output = part
        elif kind == "updates" and "rerank" in part:
            done, total = 1, (len(part["rerank"]["values"]) if comments else 0) + 2
            await context.report_progress(done, total, "values selected")
        elif kind == "custom" and part.get("step") == "comment":
            done += 1
            await context.report_progress(done, total, f"comment from {part['value']}")
    await context.report_progress(done + 1, total, "answered")
    return cast(Output, output)


@contextmanager
def _told() -> Iterator[None]:
    """Turns failures into messages for the client; none of them, nor any log, holds its texts."""
    try:
        yield
    except ToolError:
        raise
    except VispaError as error:
        raise ToolError(str(error)) from None
    except Exception as error:
        raise ToolError(f"The run failed with {type(error).__name__}. Ask again, or restart the server with another model.") from None


def _explain_unknown(unknown: Sequence[str], known: Sequence[str]) -> str:
    """Names nearly known are repeated; any other may be a person's words."""
    near = {name: found[0] for name in unknown if (found := difflib.get_close_matches(name, known, n=1, cutoff=0.8))}
    told = [f"Unknown argument {name}, did you mean {nearest}?" for name, nearest in near.items()]
    return f"{' '.join(told) or 'There are arguments that are not known.'} Known are {', '.join(known)}."


def _result(text: str, facts: dict[str, Any]) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=facts)
