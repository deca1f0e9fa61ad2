"""A LangChain chat model whose activations are steered toward a value."""

from __future__ import annotations

import asyncio
import hashlib
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import RunnableConfig
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from vispa_graph.engine.contract import Direction, Engine, Generation, GenerationRequest, Message, Steering, SteeringReport, mix
from vispa_graph.errors import InputError, SettingsError
from vispa_graph.privacy import Privacy, Redactor
from vispa_graph.settings import Settings

if TYPE_CHECKING:
    from vispa_graph.resources import Resources

_ROLES = {"human": "user", "ai": "assistant", "system": "system"}


class _Options(BaseModel):
    """What a single call may choose otherwise than its model, as in `model.invoke(messages, temperature=0.7)` or `model.bind(seed=3)`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0)
    seed: int = Field(ge=0, lt=2**63)


class SteeredChatModel(BaseChatModel):
    """A chat model on a steering engine, steered toward one value or none.

    `SteeredChatModel.create()` gives the unsteered model, `.for_value("autonomy")` one that is steered. What steering did is in the
    answer's `response_metadata["steering"]`. A call may set `max_new_tokens`, `temperature` and `seed` for itself.

    Attributes:
        engine: The engine; models made by `for_value` share it.
        find_steering: Gives the steering toward a value id, name or alias.
        steering: What this model is steered by; None for the model as it is.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 for greedy decoding.
        seed: Seed of the sampling where temperature is above 0.
        privacy: What traces get to see of its runs.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    engine: Engine = Field(repr=False, exclude=True)
    find_steering: Callable[[str], Steering | None] = Field(repr=False, exclude=True)
    steering: Steering | None = Field(None, repr=False, exclude=True)
    max_new_tokens: int = 200
    temperature: float = 0.0
    seed: int = 0
    privacy: Privacy = Field(Privacy(Redactor(frozenset())), repr=False, exclude=True)
    _owned: Resources | None = PrivateAttr(None)

    @classmethod
    def create(cls, settings: Settings | None = None, *, engine: Engine | None = None) -> SteeredChatModel:
        """The unsteered model of some settings; loads the model. `close()` lets go of it.

        Args:
            settings: None for the defaults: the embedded model.
            engine: An engine to share; None to load the one the settings name.
        """
        from vispa_graph.resources import Resources

        owned = Resources(Settings() if settings is None else settings, engine=engine)
        model = owned.chat_model
        model._owned = owned
        return model

    def close(self) -> None:
        """Close the engine, if `create` loaded it; models made by `for_value` share it. Idempotent."""
        if self._owned is not None:
            self._owned.close()

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
        if not weights:
            raise InputError("No value was given to steer toward. Name at least one, with its weight: for_values({'honor': 1.0}).")
        found = [(steering, weight) for value, weight in weights.items() if (steering := self.find_steering(value))]
        if not found:  # the strength is 0
            return self.model_copy(update={"steering": None})
        return self.model_copy(update={"steering": mix([steering for steering, _ in found], [weight for _, weight in found])})

    @property
    def _llm_type(self) -> str:
        return "vispa-steered"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        # LangChain's cache of answers has these for its key, so they must tell models and directions apart.
        params: dict[str, Any] = {
            "model": self.engine.name,
            "engine": self.engine.fingerprint,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        if self.steering:
            direction = self.steering.direction
            params |= {
                "value": direction.value,
                "method": self.steering.method,
                "direction": _digest(direction),
                "layers": list(direction.layers),
                "strength": self.steering.strength,
                "target_probability": self.steering.target_probability,
            }
            if self.steering.others:
                params["values"] = {part.direction.value: part.strength for part in self.steering.parts}
                params["others"] = [[_digest(part.direction), part.strength, part.target_probability] for part in self.steering.parts[1:]]
        return params

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return LangSmithParams(
            ls_provider="vispa",
            ls_model_name=self.engine.name,
            ls_model_type="chat",
            ls_temperature=kwargs.get("temperature", self.temperature),
            ls_max_tokens=kwargs.get("max_new_tokens", self.max_new_tokens),
        )

    # Every way in, so that the runs of a model used by itself are as private as those of a graph

    def generate(self, messages: list[list[BaseMessage]], stop: list[str] | None = None, callbacks: Callbacks = None, **kwargs: Any) -> LLMResult:
        """As in LangChain, private."""
        guard = self.privacy.guard({"callbacks": callbacks})
        model = self.privacy.model(self)
        with guard:
            try:
                return super(SteeredChatModel, model).generate(messages, stop, guard.config.get("callbacks"), **kwargs)
            except Exception as error:
                guard.rethrow(error)

    async def agenerate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, callbacks: Callbacks = None, **kwargs: Any
    ) -> LLMResult:
        """As in LangChain, private."""
        guard = self.privacy.guard({"callbacks": callbacks}, is_async=True)
        model = self.privacy.model(self)
        with guard:
            try:
                return await super(SteeredChatModel, model).agenerate(messages, stop, guard.config.get("callbacks"), **kwargs)
            except Exception as error:
                guard.rethrow(error)

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        """As in LangChain, private."""
        guard = self.privacy.guard(config)
        model = self.privacy.model(self)
        yield from guard.each(super(SteeredChatModel, model).stream(input, guard.config, stop=stop, **kwargs))

    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        """As in LangChain, private."""
        guard = self.privacy.guard(config, is_async=True)
        model = self.privacy.model(self)
        async with aclosing(guard.aeach(super(SteeredChatModel, model).astream(input, guard.config, stop=stop, **kwargs))) as chunks:
            async for chunk in chunks:
                yield chunk

    def _chat_model_stream_v3(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """`stream_events(version="v3")`, which passes by `stream`, private."""
        guard, model = self.privacy.guard(config), self.privacy.model(self)
        with guard:
            return super(SteeredChatModel, model)._chat_model_stream_v3(input, guard.config, **kwargs)

    async def _achat_model_stream_v3(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """The same, async."""
        guard, model = self.privacy.guard(config, is_async=True), self.privacy.model(self)
        with guard:
            return await super(SteeredChatModel, model)._achat_model_stream_v3(input, guard.config, **kwargs)

    def _ask(self, messages: list[BaseMessage], options: dict[str, Any], on_token: Callable[[str], None] | None = None) -> Future[Generation]:
        """Hand a request to the engine, with a listener only where someone listens: each piece of a text costs a decoding of all before it."""
        turns: list[Message] = [{"role": _ROLES.get(m.type, "user"), "content": m.text} for m in messages]  # type: ignore[typeddict-item]
        chosen = self._options(options)
        return self.engine.generate(GenerationRequest(turns, self.steering, chosen.max_new_tokens, chosen.temperature, chosen.seed, on_token))

    def _options(self, given: dict[str, Any]) -> _Options:
        own = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "seed": self.seed}
        try:
            return _Options(**(own | {name: option for name, option in given.items() if name != "stream"}))
        except ValidationError as error:
            problems = "; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
            raise SettingsError(f"The steered model cannot be called with these options ({problems}). It takes {', '.join(own)}.") from None

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any
    ) -> ChatResult:
        future = self._ask(messages, kwargs)
        try:
            return self._result(future.result(), stop)
        finally:
            future.cancel()  # whoever was interrupted needs no answer

    async def _agenerate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any
    ) -> ChatResult:
        return self._result(await asyncio.wrap_future(self._ask(messages, kwargs)), stop)

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        future = self._ask(messages, kwargs, pieces.put)
        try:
            future.add_done_callback(lambda _: pieces.put(None))
            filter_ = _Stop(stop)
            while (piece := pieces.get()) is not None:
                if text := filter_.take(piece):
                    yield self._piece(text, run_manager)
            if text := filter_.rest():
                yield self._piece(text, run_manager)
            yield self._last(future)
        finally:
            future.cancel()  # whoever stopped listening needs no answer

    async def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def put(piece: str | None) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody listens any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        future = self._ask(messages, kwargs, put)
        try:
            future.add_done_callback(lambda _: put(None))
            filter_ = _Stop(stop)
            while (piece := await pieces.get()) is not None:
                if text := filter_.take(piece):
                    yield await self._apiece(text, run_manager)
            if text := filter_.rest():
                yield await self._apiece(text, run_manager)
            yield self._last(future)
        finally:
            future.cancel()

    @staticmethod
    def _piece(text: str, run_manager: CallbackManagerForLLMRun | None) -> ChatGenerationChunk:
        chunk = ChatGenerationChunk(message=AIMessageChunk(content=text))
        if run_manager:
            run_manager.on_llm_new_token(text, chunk=chunk)
        return chunk

    @staticmethod
    async def _apiece(text: str, run_manager: AsyncCallbackManagerForLLMRun | None) -> ChatGenerationChunk:
        chunk = ChatGenerationChunk(message=AIMessageChunk(content=text))
        if run_manager:
            await run_manager.on_llm_new_token(text, chunk=chunk)
        return chunk

    def _last(self, future: Future[Generation]) -> ChatGenerationChunk:
        """The closing chunk: no text, but usage and what steering did."""
        generation = future.result()
        facts = _metadata(generation)
        return ChatGenerationChunk(
            message=AIMessageChunk(content="", usage_metadata=_usage(generation), response_metadata=facts, chunk_position="last")
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


def _digest(direction: Direction) -> str:
    """Tells directions apart, 16 hex digits."""
    digest = hashlib.sha256(repr((direction.value, direction.method, direction.layers, direction.alpha)).encode())
    digest.update(direction.vectors.tobytes() + direction.bias.tobytes())
    return digest.hexdigest()[:16]


def _metadata(generation: Generation) -> dict[str, Any]:
    report, first = generation.steering, generation.first_token_seconds
    return {
        "finish_reason": generation.finish,
        "cut_tokens": generation.cut_tokens,
        "batch_rows": generation.batch_rows,
        "batch_width": generation.batch_width,
        "batch_halved": generation.halved,
        "dtype": generation.dtype,
        "first_token_seconds": first and round(first, 4),
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
