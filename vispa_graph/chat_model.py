"""A LangChain chat model whose activations are steered toward a value."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, Field

from vispa_graph.engine.contract import Engine, Generation, GenerationRequest, Message, Steering, SteeringReport, mix
from vispa_graph.settings import Settings

_ROLES = {"human": "user", "ai": "assistant", "system": "system"}


class SteeredChatModel(BaseChatModel):
    """A chat model on a steering engine, steered toward one value or none.

    `SteeredChatModel.create()` gives the unsteered model, `.for_value("autonomy")` one that is steered. What steering did is in the
    answer's `response_metadata["steering"]`.

    Attributes:
        engine: The engine; models made by `for_value` share it.
        find_steering: Gives the steering toward a value id, name or alias.
        steering: What this model is steered by; None for the model as it is.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 for greedy decoding.
        seed: Seed of the sampling where temperature is above 0.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    engine: Engine = Field(repr=False, exclude=True)
    find_steering: Callable[[str], Steering | None] = Field(repr=False, exclude=True)
    steering: Steering | None = Field(None, repr=False, exclude=True)
    max_new_tokens: int = 200
    temperature: float = 0.0
    seed: int = 0

    @classmethod
    def create(cls, settings: Settings | None = None, *, engine: Engine | None = None) -> SteeredChatModel:
        """The unsteered model of some settings; loads the model.

        Args:
            settings: None for the defaults: the embedded model.
            engine: An engine to share; None to load the one the settings name.
        """
        from vispa_graph.resources import Resources

        return Resources(settings or Settings(), engine=engine).chat_model

    def for_value(self, value: str) -> Self:
        """A model on the same engine, steered toward a value of the taxonomy.

        Raises:
            UnknownValueError: The taxonomy does not hold the value.
        """
        return self.model_copy(update={"steering": self.find_steering(value)})

    def for_values(self, weights: Mapping[str, float]) -> Self:
        """A model on the same engine, steered toward several values at once.

        Args:
            weights: For each value what its strength is multiplied by; below 0 the value is suppressed.

        Raises:
            UnknownValueError: The taxonomy does not hold a value.
            InputError: There is no value.
        """
        found = [(steering, weight) for value, weight in weights.items() if (steering := self.find_steering(value))]
        if weights and not found:  # the strength is 0
            return self.model_copy(update={"steering": None})
        return self.model_copy(update={"steering": mix([steering for steering, _ in found], [weight for _, weight in found])})

    @property
    def _llm_type(self) -> str:
        return "vispa-steered"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        params: dict[str, Any] = {
            "model": self.engine.name,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        if self.steering:
            direction = self.steering.direction
            params |= {
                "value": direction.value,
                "method": self.steering.method,
                "layers": list(direction.layers),
                "strength": self.steering.strength,
                "target_probability": self.steering.target_probability,
            }
            if self.steering.others:
                params["values"] = {part.direction.value: part.strength for part in self.steering.parts}
        return params

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return LangSmithParams(
            ls_provider="vispa",
            ls_model_name=self.engine.name,
            ls_model_type="chat",
            ls_temperature=self.temperature,
            ls_max_tokens=self.max_new_tokens,
        )

    def _request(self, messages: list[BaseMessage], on_token: Callable[[str], None] | None = None) -> GenerationRequest:
        turns: list[Message] = [{"role": _ROLES.get(m.type, "user"), "content": m.text} for m in messages]  # type: ignore[typeddict-item]
        return GenerationRequest(turns, self.steering, self.max_new_tokens, self.temperature, self.seed, on_token)

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any
    ) -> ChatResult:
        return self._result(self.engine.generate(self._request(messages)).result(), stop)

    async def _agenerate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any
    ) -> ChatResult:
        return self._result(await asyncio.wrap_future(self.engine.generate(self._request(messages))), stop)

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        future = self.engine.generate(self._request(messages, pieces.put))
        future.add_done_callback(lambda _: pieces.put(None))
        filter_ = _Stop(stop)
        try:
            while (piece := pieces.get()) is not None:
                if text := filter_.take(piece):
                    yield self._piece(text, run_manager)
            if text := filter_.rest():
                yield self._piece(text, run_manager)
            yield self._last(future)
        finally:  # whoever stops listening frees the row
            future.cancel()

    async def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def put(piece: str | None) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody listens any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        future = self.engine.generate(self._request(messages, put))
        future.add_done_callback(lambda _: put(None))
        filter_ = _Stop(stop)
        try:
            while (piece := await pieces.get()) is not None:
                if text := filter_.take(piece):
                    chunk = ChatGenerationChunk(message=AIMessageChunk(content=text))
                    if run_manager:
                        await run_manager.on_llm_new_token(text, chunk=chunk)
                    yield chunk
            if text := filter_.rest():
                yield ChatGenerationChunk(message=AIMessageChunk(content=text))
            yield self._last(future)
        finally:
            future.cancel()

    @staticmethod
    def _piece(text: str, run_manager: CallbackManagerForLLMRun | None) -> ChatGenerationChunk:
        chunk = ChatGenerationChunk(message=AIMessageChunk(content=text))
        if run_manager:
            run_manager.on_llm_new_token(text, chunk=chunk)
        return chunk

    def _last(self, future: Future[Generation]) -> ChatGenerationChunk:
        """The closing chunk: no text, but usage and what steering did."""
        generation = future.result()
        return ChatGenerationChunk(
            message=AIMessageChunk(content="", usage_metadata=_usage(generation), response_metadata=_metadata(generation), chunk_position="last")
        )

    def _result(self, generation: Generation, stop: list[str] | None) -> ChatResult:
        filter_ = _Stop(stop)
        text = filter_.take(generation.text) + filter_.rest()
        message = AIMessage(content=text, usage_metadata=_usage(generation), response_metadata=_metadata(generation))
        return ChatResult(generations=[ChatGeneration(message=message)])


class _Stop:
    """Ends a streamed text before the first of some stop sequences, also where one spans two pieces."""

    def __init__(self, stop: list[str] | None) -> None:
        self._stop = [s for s in stop or () if s]
        self._held, self._over = "", False

    def take(self, piece: str) -> str:
        if self._over:
            return ""
        if not self._stop:
            return piece
        self._held += piece
        # The sequence that is complete first counts, however the text was cut into pieces.
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self._over = True
            return self._held[: min(found)[1]]
        keep = max(map(len, self._stop)) - 1
        cut = max(0, len(self._held) - keep)
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def rest(self) -> str:
        return "" if self._over else self._held


def _usage(generation: Generation) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=generation.prompt_tokens,
        output_tokens=generation.completion_tokens,
        total_tokens=generation.prompt_tokens + generation.completion_tokens,
    )


def _metadata(generation: Generation) -> dict[str, Any]:
    report = generation.steering
    return {
        "finish_reason": generation.finish,
        "cut_tokens": generation.cut_tokens,
        "batch_rows": generation.batch_rows,
        "batch_width": generation.batch_width,
        "batch_halved": generation.halved,
        "dtype": generation.dtype,
        "steering": report and _facts(report),
    }


def _facts(report: SteeringReport) -> dict[str, Any]:
    return {
        "value": report.value,
        "positions": report.positions,
        "layers": list(report.layers),
        "magnitude": list(report.magnitude),
        "before": report.before and list(report.before),
        "after": report.after and list(report.after),
        "displacement": report.displacement,
        "others": [_facts(other) for other in report.others],
    }
