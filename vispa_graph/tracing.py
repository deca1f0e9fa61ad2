"""Traces of one's own: runs for what no LangChain component makes, and a run as a local file for whoever has no viewer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.config import get_callback_manager_for_config, merge_configs
from pydantic import BaseModel, ConfigDict, ValidationError

from vispa_graph.engine.contract import Engine, ScoreRequest, Scores
from vispa_graph.errors import TraceError
from vispa_graph.waiting import Steps, arun_steps, run_steps, settled

if TYPE_CHECKING:
    from langchain_core.tracers.schemas import Run
    from rich.tree import Tree

T = TypeVar("T")


# Runs


class Untraced(Runnable[Any, Any]):
    """A node or a route, sync and async, that makes no run of its own: LangGraph's run of the node says all."""

    def __init__(self, name: str, func: Callable[[Any, RunnableConfig], Any], afunc: Callable[[Any, RunnableConfig], Any] | None = None) -> None:
        self.name, self._func, self._afunc = name, func, afunc

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Call the function."""
        return self._func(input, config or {})

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Call the async function, or else the sync one, which must be quick."""
        return await self._afunc(input, config or {}) if self._afunc else self._func(input, config or {})


class Waiting(Untraced):
    """A node that waits for models: a generator of what it waits for, the same for sync and async runs."""

    def __init__(self, name: str, node: Callable[[Any, RunnableConfig], Steps[Any]]) -> None:
        def steps(given: Any, config: RunnableConfig) -> Steps[Any]:
            return (yield from node(given, config))

        super().__init__(name, lambda given, config: run_steps(steps(given, config)), lambda given, config: arun_steps(steps(given, config)))


def traced(name: str, work: Callable[[], T], config: RunnableConfig, inputs: Any = None) -> T:
    """Do some work in a chain run of its own; its result is the run's output."""
    return RunnableLambda(lambda _: work(), name=name).invoke(inputs, {**config, "run_name": name})


def score_traced(engine: Engine, requests: Sequence[ScoreRequest], values: Sequence[str], config: RunnableConfig | None) -> Steps[list[Scores]]:
    """Score option letters, all in one batch, each in an llm run of its own; `values` says on whose comment each request rests."""
    labels = {"ls_provider": "vispa", "ls_model_name": engine.name, "ls_model_type": "chat"}
    runs = []
    for request, value in zip(requests, values, strict=True):
        manager = get_callback_manager_for_config(merge_configs(config, {"metadata": {**labels, "value": value}}))
        messages: list[list[BaseMessage]] = [[HumanMessage(message["content"]) for message in request.messages]]
        runs += manager.on_chat_model_start({"name": "vispa-steered"}, messages, name="score options", invocation_params={"model": engine.name})
    try:
        outcomes = yield from settled(lambda: [engine.score(request) for request in requests])
    except BaseException as error:  # cancelled: no run is left open
        for run in runs:
            run.on_llm_error(error)
        raise
    scores: list[Scores] = []
    failures: list[Exception] = []
    for run, request, outcome in zip(runs, requests, outcomes, strict=True):
        if isinstance(outcome, Exception):
            run.on_llm_error(outcome)
            failures.append(outcome)
        else:
            run.on_llm_end(_told(request, outcome))
            scores.append(outcome)
    if failures:
        raise failures[0]
    return scores


def _told(request: ScoreRequest, score: Scores) -> LLMResult:
    """A score as an llm run tells it: the likeliest letter, with the figures."""
    facts = {"probabilities": list(score.probabilities), "mass": score.mass, "cut_tokens": score.cut_tokens, "batch_halved": score.halved}
    best = max(zip(score.probabilities, request.letters, strict=True))[1]
    usage = UsageMetadata(input_tokens=score.prompt_tokens, output_tokens=0, total_tokens=score.prompt_tokens)
    return LLMResult(generations=[[ChatGeneration(message=AIMessage(best, response_metadata=facts, usage_metadata=usage))]])


# Files


class TracedRun(BaseModel):
    """A run and the runs inside it, as a trace file holds them.

    Attributes:
        inputs, outputs, error: "redacted", wholly or in their texts, unless content was to be traced.
        start, end: ISO 8601; no end where the run was cut off.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    run_type: str
    start: datetime
    end: datetime | None
    inputs: Any
    outputs: Any
    error: str | None
    tags: list[str]
    metadata: dict[str, Any]
    children: list[TracedRun]

    @classmethod
    def of(cls, run: Run) -> TracedRun:
        """What a tracer recorded, as plain data: objects become their fields or their text."""
        return cls(
            name=run.name,
            run_type=run.run_type,
            start=run.start_time,
            end=run.end_time,
            inputs=_plain(run.inputs),
            outputs=_plain(run.outputs),
            error=run.error,
            tags=run.tags or [],
            metadata=_plain(run.metadata),
            children=[cls.of(child) for child in sorted(run.child_runs, key=lambda child: child.start_time)],
        )

    def to_json(self) -> bytes:
        """The trace as JSON."""
        return self.model_dump_json(indent=1).encode()


def read_trace(path: Path) -> TracedRun:
    """The run that `vispa ask --trace FILE` wrote.

    Raises:
        TraceError: The file is missing, or holds no such run.
    """
    try:
        return TracedRun.model_validate_json(path.read_bytes())
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}. Give the file that `vispa ask --trace FILE` wrote.") from error
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise TraceError(
            f"{path} is not a trace{f' (at {place})' if place else ''}: {problem['msg']}. Give the file that `vispa ask --trace FILE` wrote."
        ) from None


def draw(run: TracedRun) -> Tree:
    """The run as a tree to print: a line a run, with what explains it.

    Raises:
        TraceError: A run in it tells of itself in another shape than `TracedRun.of` does.
    """
    from rich.text import Text
    from rich.tree import Tree

    def add(parent: Tree, child: TracedRun) -> None:
        line = parent.add(Text(describe(child)))
        for fact in _documents(child):
            line.add(Text(fact))
        for grandchild in child.children:
            add(line, grandchild)

    try:
        tree = Tree(Text(describe(run)))
        for child in run.children:
            add(tree, child)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise TraceError(
            "The trace cannot be drawn: what a run in it tells has another shape than `vispa ask --trace FILE` writes. "
            "Trace the question again, or read the file with --json."
        ) from None
    return tree


def describe(run: TracedRun, *, timed: bool = True) -> str:
    """A run in one line: name, kind, what is known of it, and how long it took."""
    facts = [*_run_facts(run), *(_times(run) if timed else [])]
    if run.error is not None:
        facts.append(f"failed: {run.error.splitlines()[0] if run.error else 'no reason given'}")
    return f"{run.name} ({run.run_type}){': ' if facts else ''}{', '.join(facts)}"


def _times(run: TracedRun) -> Iterator[str]:
    first = (_message(run).get("response_metadata") or {}).get("first_token_seconds")
    if first is not None:
        yield f"first token after {first:.3f} s"
    yield f"{(run.end - run.start).total_seconds():.3f} s" if run.end else "not ended"


def _run_facts(run: TracedRun) -> Iterator[str]:
    if run.name == "vispa":
        yield from (tag for tag in sorted(run.tags) if tag.startswith(("mode:", "method:")))
    value = run.metadata.get("value")
    if run.run_type == "llm" and value and value not in run.name:
        yield f"after {value}"
    message = _message(run)
    usage, facts = message.get("usage_metadata") or {}, message.get("response_metadata") or {}
    if usage:
        yield f"{usage.get('input_tokens')} + {usage.get('output_tokens')} tokens"
    if steering := facts.get("steering"):
        layers = steering.get("layers") or []
        yield f"layers {min(layers)} to {max(layers)}" if layers else "no layers"
        if steering.get("before") and steering.get("after"):
            yield f"probability {_mean(steering['before']):.3f} > {_mean(steering['after']):.3f}"
        yield f"moved by {steering['displacement']:.0%} of the residual norm"
    if "batch_rows" in facts:
        yield f"batch {facts['batch_rows']} x {facts.get('batch_width')} {facts.get('dtype')}"
    if "mass" in facts:
        yield "letters " + " ".join(f"{p:.2f}" for p in facts["probabilities"]) + f" of {facts['mass']:.2f}"
    if run.run_type == "retriever" and isinstance(run.outputs, dict):
        yield f"{len(run.outputs.get('documents', []))} documents"
    if run.name == "compose" and isinstance(run.outputs, dict):
        rests_on = [", ".join(attribution["values"]) for attribution in run.outputs.get("output", [])]
        yield "sentences that rest on " + "; ".join(rests_on)


def _documents(run: TracedRun, most: int = 6) -> Iterator[str]:
    """The first documents of a retriever run."""
    found = run.outputs.get("documents", []) if run.run_type == "retriever" and isinstance(run.outputs, dict) else []
    for document in found[:most]:
        metadata = document.get("metadata", {}) if isinstance(document, dict) else {}
        what = metadata.get("value") or metadata.get("source")
        moved = f", from place {metadata['retrieved']} to {metadata['rank']}" if metadata.get("retrieved") else ""
        why = metadata.get("reason") or document.get("page_content", "")
        yield f"{metadata.get('score', 0):.2f} {what}{moved}: {why}"
    if len(found) > most:
        yield f"... and {len(found) - most} more"


def _message(run: TracedRun) -> dict[str, Any]:
    """The message that an llm run ended with; empty where there is none."""
    try:
        message = run.outputs["generations"][0][0]["message"]
    except (TypeError, KeyError, IndexError):
        return {}
    found = message.get("kwargs", message) if isinstance(message, dict) else {}
    return found if isinstance(found, dict) else {}


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda odd: odd.model_dump() if hasattr(odd, "model_dump") else str(odd)))
