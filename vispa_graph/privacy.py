"""What the callbacks of a run get to see: its shape, its numbers, and texts of the taxonomy; nothing that a person or a model wrote.

Everything that observes a LangChain run (LangSmith, OpenTelemetry, OpenInference, a host's own handlers) is a callback handler. Inside
a run of ours each handler is replaced by a view that passes every event on with its texts left out. The view keeps the handler's
state, so that our runs nest inside the host's. Handlers of the caller's own streams (`astream_events`, `stream_mode="messages"`)
are no traces and see everything.

What passes is listed here; whatever is not listed is left out. `tests/test_privacy.py` holds it against every way out that is known.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from inspect import iscoroutinefunction
from types import BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType
from typing import Any, NoReturn, TypeVar, cast
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackManager, BaseCallbackHandler, BaseCallbackManager, CallbackManager, Callbacks
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.outputs import Generation as TextGeneration
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import merge_configs, var_child_runnable_config
from langchain_core.tools import StructuredTool
from langchain_core.tracers._streaming import _StreamingCallbackHandler
from langchain_core.tracers.context import _configure_hooks, tracing_v2_callback_var
from langgraph.errors import GraphBubbleUp
from langgraph.types import Overwrite
from pydantic import Field

from vispa_graph import state
from vispa_graph.attributes import ATTRIBUTE
from vispa_graph.errors import VispaError
from vispa_graph.taxonomy_index import Taxonomy
from vispa_graph.taxonomy_index.index import phrases_of
from vispa_graph.threads import configurable

C = TypeVar("C", bound=BaseChatModel)
T = TypeVar("T")
Scrubber = Callable[[str], str]
REDACTED = "redacted"
_LOGGER = logging.getLogger(__name__)

# Why a value was heard or a comment chosen, in words of ours. A reason that stands neither here nor quotes the taxonomy is left out.
REASONS = frozenset(
    {
        "named by the caller",
        "the attribute asked for",
        "added in review",
        "the attribute names this value",
        "made by steering toward the attribute itself",
        "chosen by the main language model",
        "nearest to the attribute by sentence embedding",
        "no phrase near the query points at it",
        "not named by the language model",
    }
)
# What rerankers that score put before such a reason.
_SCORED = re.compile(r"(entailed with probability|cross-encoder score) \d\.\d\d; ")
# Texts under these keys are labels that programs write, never words of a person.
_LABELS = frozenset(
    {
        *("mode", "model", "settings", "method", "finish", "kind", "type", "role", "dtype", "engine", "direction", "step"),
        *("finish_reason", "stop_reason", "model_name", "model_provider", "system_fingerprint", "_type"),
    }
)
# Texts under these keys pass if the taxonomy itself holds them.
_TAXONOMY = frozenset({"id", "value", "values", "name", "family", "source", "reason", "text", "page_content"})
_NUMBERS = frozenset(
    {
        *("input_tokens", "output_tokens", "total_tokens", "input_token_details", "output_token_details", "token_usage", "usage_metadata"),
        *("prompt_tokens", "completion_tokens", "cache_read", "cache_creation", "reasoning", "audio"),
        *("max_new_tokens", "max_tokens", "temperature", "seed", "strength", "target_probability", "layers", "magnitude", "before", "after"),
        *("displacement", "cut_tokens", "batch_rows", "batch_width", "batch_halved", "first_token_seconds"),
        *("mass", "probabilities", "rank", "retrieved", "k", "n"),
    }
)
_CONTAINERS = frozenset({"metadata", "steering", "documents", "messages", "generations", "response_metadata", "input", "output", "batch_shape"})
_STATE = frozenset().union(
    *(
        shape.__annotations__
        for shape in (state.State, state.Output, state.Candidate, state.SelectedValue, state.SteeringFacts, state.Comment, state.Chosen)
    ),
    *(shape.__annotations__ for shape in (state.Attribution, state.SteerTask, state.Input)),
)
_KNOWN = _LABELS | _TAXONOMY | _NUMBERS | _CONTAINERS | _STATE
# Metadata that LangGraph, LangSmith and we write. A host's own passes through its own runs, not through ours.
_METADATA_LABELS = frozenset(
    {
        *("thread_id", "checkpoint_ns", "checkpoint_id", "revision_id", "lc_versions"),
        *(
            "ls_provider",
            "ls_model_name",
            "ls_model_type",
            "ls_integration",
            "ls_retriever_name",
            "ls_vector_store_provider",
            "ls_embedding_provider",
        ),
        *("langgraph_node", "langgraph_triggers", "langgraph_path", "langgraph_checkpoint_ns", "langgraph_version"),
    }
)
# Of these what `value` lets through: labels, numbers, and texts of the taxonomy.
_METADATA_FACTS = _NUMBERS | {
    *("mode", "method", "model", "model_name", "engine", "direction", "_type", "value", "family"),
    *("run_attempt", "ls_temperature", "ls_max_tokens", "langgraph_step"),
}
_PASSED = frozenset({"run_id", "parent_run_id", "tags", "name", "run_type", "batch_size", "defers_inputs", "tool_call_id"})
_EVENTS = {f"on_{kind}_{moment}" for kind in ("llm", "chain", "tool", "retriever") for moment in ("start", "end", "error")}
_EVENTS |= {"on_chat_model_start", "on_llm_new_token"}


class Redactor:
    """Leaves the texts out of whatever a callback is given.

    Args:
        public: Texts that may be shown under the keys that hold taxonomy: ids, names, phrases.
        scrubber: None to leave all other texts out; else what turns a text into one without identifiers.
    """

    def __init__(self, public: Collection[str], scrubber: Scrubber | None = None) -> None:
        self._public = public
        # The same state passes through every node of a run.
        self._scrub = lru_cache(maxsize=256)(scrubber) if scrubber else None

    def text(self, text: str) -> str:
        """The text as traces may hold it."""
        if self._scrub is None:
            return REDACTED
        try:
            return self._scrub(text)
        except Exception as error:
            _LOGGER.warning("The scrubber failed (%s), so a text was left out of the trace.", type(error).__name__)
            return REDACTED

    def value(self, value: Any, key: str = "") -> Any:
        """A value of any kind as traces may hold it; `key` is what it stands under."""
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            said = _SCORED.sub("", value, count=1) if key == "reason" and _SCORED.match(value) else value
            return value if key in _LABELS or (key in _TAXONOMY and said in self._public) else self.text(value)
        if isinstance(value, Mapping):
            return self._mapping(value, key)
        if isinstance(value, list | tuple):
            return [self.value(entry, key) for entry in value]
        if isinstance(value, BaseMessage):
            return self._message(value)
        if isinstance(value, Document):
            return Document(page_content=self.value(value.page_content, "page_content"), metadata=self._mapping(value.metadata, "metadata"))
        if isinstance(value, LLMResult):
            return LLMResult(
                generations=[[self._generation(g) for g in batch] for batch in value.generations],
                llm_output=value.llm_output and self._mapping(value.llm_output, ""),
            )
        if isinstance(value, Overwrite):
            return self.value(value.value, key)
        if isinstance(value, UUID):
            return value
        return REDACTED

    def metadata(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Metadata of a run: what programs wrote stays, all else is left out with its keys."""
        kept = {key: value for key, value in metadata.items() if key in _METADATA_LABELS}
        return kept | {key: self.value(value, key) for key, value in metadata.items() if key in _METADATA_FACTS}

    def event(self, name: str, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of a callback as it may see them; None for an event that is not passed on."""
        if name in ("on_interrupt", "on_resume"):  # LangGraph's own: tells that a run stopped, with what it shows to a person
            return tuple(replace(event, interrupts=()) if hasattr(event, "interrupts") else event for event in given), named
        if name not in _EVENTS:
            return None
        if name == "on_llm_new_token":
            # A name cut into tokens is no name to a scrubber.
            return ("",), {key: value for key, value in self._named(named).items() if key != "chunk"}
        if name == "on_tool_start":  # an agent's arguments, not checked yet: anything may stand under any key
            serialized, _, *rest = given
            inputs = named.get("inputs") or {}
            shown = {key: self.text(str(value)) for key, value in inputs.items() if key in _STATE}
            return (_identity(serialized), self.text(str(inputs)), *(REDACTED for _ in rest)), self._named({**named, "inputs": None}) | {
                "inputs": shown
            }
        if name.endswith("_start"):
            serialized, *rest = given
            return (_identity(serialized), *(self._payload(entry) for entry in rest)), self._named(named)
        return tuple(without_text(entry) if isinstance(entry, BaseException) else self.value(entry) for entry in given), self._named(named)

    def _payload(self, payload: Any) -> Any:
        # A tracer wants the text of a tool's input and a retriever's query as text, whatever it was.
        return self.text(payload) if isinstance(payload, str) else self.value(payload)

    def _named(self, named: dict[str, Any]) -> dict[str, Any]:
        shown = {}
        for key, value in named.items():
            if key in _PASSED:
                shown[key] = value
            elif key == "metadata":
                shown[key] = value and self.metadata(value)
            else:
                shown[key] = self.value(value)
        return shown

    def _mapping(self, mapping: Mapping[Any, Any], key: str) -> dict[str, Any]:
        if key == "distribution":  # its keys are the caller's options
            return {f"option {number}": self.value(value) for number, value in enumerate(mapping.values(), 1)}
        shown = {k: self.value(v, k) for k, v in mapping.items() if isinstance(k, str) and (k in _KNOWN or k in self._public) and k != "candidates"}
        if isinstance(found := mapping.get("candidates"), list):  # the retriever's run holds them; every other run would carry them along
            return shown | {"candidates": len(found)}
        left_out = len(mapping) - len(shown)
        return shown | ({f"{REDACTED} keys": left_out} if left_out else {})

    def _message(self, message: BaseMessage) -> BaseMessage:
        content = self.text(message.text) if message.text else ""
        facts = self._mapping(message.response_metadata, "response_metadata")
        kept: dict[str, Any] = {"content": content, "additional_kwargs": {}, "response_metadata": facts, "name": None, "artifact": None}
        kept |= {"tool_calls": [], "invalid_tool_calls": []}
        shown = message.model_copy(update={name: value for name, value in kept.items() if name in type(message).model_fields})
        (shown.__pydantic_extra__ or {}).clear()
        return shown

    def _generation(self, generation: TextGeneration) -> TextGeneration:
        if isinstance(generation, ChatGeneration):
            return ChatGeneration(message=self._message(generation.message))
        return TextGeneration(text=self.text(generation.text))


def without_text(error: BaseException, *, keeps_original: bool = False) -> BaseException:
    """An exception of the same class that does not tell what it was about.

    Messages of other libraries' errors, and of the errors they came from, may quote a prompt, and so may their attributes. Its class
    remains, or the nearest base that can be derived from, those of its attributes that are numbers or None, and the status code of a
    response that it holds, so that a host's `except` clauses and retries go on working.

    Args:
        keeps_original: Whether the attribute `original` gives the error itself; `vars` and pickling never do.
    """
    inside = [without_text(each) for each in error.exceptions] if isinstance(error, BaseExceptionGroup) else []
    return _textless(type(error), _numbers(error), inside, error if keeps_original else None)


def _textless(cls: type[BaseException], numbers: dict[str, Any], inside: list[BaseException], original: BaseException | None = None) -> BaseException:
    told = f"{REDACTED}: the error's own message may hold private text; it is at the attribute `original`"
    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__str__": lambda _: told,
        "__repr__": lambda _: f"{cls.__name__}({REDACTED!r})",
        "__reduce__": lambda _: (_textless, (cls, numbers, inside)),
        "hides_text": True,
        "original": property(lambda _: original),
    }
    shown = _derived(cls.__name__, cls.__mro__, body, inside)
    for name, value in {**numbers, "args": (REDACTED,)}.items():
        with suppress(Exception):  # computed from others, or of a base that lacks it
            object.__setattr__(shown, name, value)
    return shown


def _numbers(error: BaseException) -> dict[str, Any]:
    """The attributes that are numbers or None, also those that stand in no `__dict__`, such as an `errno`."""
    found = dict(vars(error))
    for cls in type(error).__mro__:
        slots = {name: slot for name, slot in vars(cls).items() if isinstance(slot, MemberDescriptorType | GetSetDescriptorType)}
        for name, slot in slots.items():
            if not name.startswith("__"):
                with suppress(Exception):  # never set
                    found.setdefault(name, slot.__get__(error))
    numbers = {name: _plain(value) for name, value in found.items() if value is None or isinstance(value, int | float)}
    return numbers | {name: response for name, value in found.items() if (response := _response(value)) is not None}


@dataclass(frozen=True)
class StatusOnly:
    """What remains of a server's response in an error shown without its text: hosts decide by it whether to try again.

    Attributes:
        ok: The response's own truth, which for `requests` says whether it was a success.
    """

    status_code: int
    ok: bool

    def __bool__(self) -> bool:
        return self.ok


def _response(value: Any) -> StatusOnly | None:
    with suppress(Exception):  # an object of another library may do anything when it is looked at
        if type(value.status_code) is int:
            return StatusOnly(value.status_code, bool(value))
    return None


def _plain(number: Any) -> Any:
    """Without what a class of its own may add to it, such as the name in an enumeration."""
    return number if number is None or isinstance(number, bool) else +number


def _derived(name: str, bases: Sequence[type], body: dict[str, Any], inside: list[BaseException]) -> BaseException:
    """An empty error of a class derived from the first of the bases that allows it: not every one can be derived from."""
    try:
        cls: Any = type(name, (bases[0],), dict(body))
        if issubclass(cls, BaseExceptionGroup):
            return cast(BaseException, BaseExceptionGroup.__new__(cls, REDACTED, inside))
        # Past what a class of another library wants to be made with.
        makes = next(new for base in cls.__mro__ if isinstance(new := vars(base).get("__new__"), BuiltinFunctionType))
        return cast(BaseException, makes(cls))
    except Exception:
        return _derived(name, bases[1:], body, inside)


def _hide_causes(error: BaseException) -> None:
    """Leave the texts out of the errors of other libraries that an error of ours came from: stack traces print them too."""
    while True:
        chosen = error.__cause__ is not None
        cause = error.__cause__ if chosen or error.__suppress_context__ else error.__context__
        if cause is None or hasattr(cause, "hides_text"):
            return
        if not isinstance(cause, VispaError):
            hidden = without_text(cause, keeps_original=True)
            if chosen:
                error.__cause__ = hidden
            else:
                error.__context__ = hidden
            return
        error = cause


class _View:
    """Stands in for a callback handler, and is taken for it by `isinstance`; events pass through the redactor."""

    __slots__ = ("_handler", "_redactor")

    def __init__(self, handler: BaseCallbackHandler, redactor: Redactor) -> None:
        object.__setattr__(self, "_handler", handler)
        object.__setattr__(self, "_redactor", redactor)

    @property
    def __class__(self) -> Any:
        return type(self._handler)

    @__class__.setter
    def __class__(self, _: Any) -> None:
        raise AttributeError("The class of a view is that of its handler.")

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._handler, name, value)

    def __getattr__(self, name: str) -> Any:
        handler, redactor = object.__getattribute__(self, "_handler"), object.__getattribute__(self, "_redactor")
        found = getattr(handler, name)
        if name == "copy_with_metadata_defaults":
            return partial(_copied, found, redactor)
        if not name.startswith("on_") or not callable(found):
            return found
        return partial(_apass_on if iscoroutinefunction(found) else _pass_on, found, redactor, name)


def _copied(copy: Callable[..., Any], redactor: Redactor, *, metadata: Mapping[str, Any] | None = None, **named: Any) -> Any:
    return _View(copy(metadata=metadata and redactor.metadata(metadata), **named), redactor)


def _pass_on(method: Callable[..., Any], redactor: Redactor, name: str, /, *given: Any, **named: Any) -> Any:
    shown = redactor.event(name, given, named)
    return None if shown is None else method(*shown[0], **shown[1])


async def _apass_on(method: Callable[..., Any], redactor: Redactor, name: str, /, *given: Any, **named: Any) -> Any:
    shown = redactor.event(name, given, named)
    return None if shown is None else await method(*shown[0], **shown[1])


def _identity(serialized: Any) -> Any:
    """Of a serialised component its class; its arguments may hold anything."""
    return {key: serialized[key] for key in ("lc", "type", "id", "name") if key in serialized} if isinstance(serialized, Mapping) else None


@dataclass(frozen=True)
class Privacy:
    """How runs of one graph, model or tool are shown to callbacks; `open` shows them as they are.

    Attributes:
        redactor: None where traces may hold everything.
    """

    redactor: Redactor | None

    @classmethod
    def of(cls, taxonomy: Taxonomy, *, trace_content: bool, scrubber: Scrubber | None) -> Privacy:
        """Texts left out; with `trace_content` kept, scrubbed where there is a scrubber."""
        if trace_content and scrubber is None:
            return cls(None)
        return cls(Redactor(_public_texts(taxonomy), scrubber if trace_content else None))

    def guard(self, *configs: RunnableConfig | None, is_async: bool = False, joins: bool = False) -> Guard:
        """What a run under these configurations must be wrapped in.

        Args:
            configs: Later ones add to earlier ones.
            is_async: Whether the run is.
            joins: Whether the callbacks given add to those of the run around, as in LangGraph; else they take their place, as in LangChain.
        """
        return Guard(self.redactor, configs, is_async, joins)

    def model(self, model: C) -> C:
        """The chat model, with the callbacks that it was made with as views."""
        if self.redactor is None or not model.callbacks:
            return model
        return model.model_copy(update={"callbacks": _private(model.callbacks, {}, self.redactor)})


def _public_texts(taxonomy: Taxonomy) -> frozenset[str]:
    found = phrases_of(taxonomy)
    phrases = {phrase.text for phrase in found}
    sources = {phrase.source for phrase in found}
    labels = {label for value in taxonomy for label in (value.id, value.name, value.family, value.source)}
    reasons = {f'{word} "{phrase}"' for phrase in phrases for word in ("like", "about", "as in", "is about")}
    return frozenset(phrases | sources | labels | reasons | REASONS | {ATTRIBUTE})


class PrivateTool(StructuredTool):
    """A tool whose own run is as private as what runs inside it."""

    privacy: Privacy = Field(repr=False, exclude=True)

    def run(
        self,
        tool_input: str | dict[str, Any],
        verbose: bool | None = None,
        start_color: str | None = "green",
        color: str | None = "green",
        callbacks: Callbacks = None,
        **named: Any,
    ) -> Any:
        """As in LangChain, private."""
        guard = self.privacy.guard({"callbacks": callbacks})
        with guard:
            return super().run(tool_input, verbose, start_color, color, guard.config.get("callbacks"), **named)

    async def arun(
        self,
        tool_input: str | dict[str, Any],
        verbose: bool | None = None,
        start_color: str | None = "green",
        color: str | None = "green",
        callbacks: Callbacks = None,
        **named: Any,
    ) -> Any:
        """As in LangChain, private."""
        guard = self.privacy.guard({"callbacks": callbacks}, is_async=True)
        with guard:
            return await super().arun(tool_input, verbose, start_color, color, guard.config.get("callbacks"), **named)


class Guard(AbstractContextManager[None]):
    """The callbacks of one run as views, wherever LangChain finds them: in a configuration, around the caller, in the environment.

    Enter it for every step of the run, and give the run `config`.
    """

    def __init__(self, redactor: Redactor | None, configs: Sequence[RunnableConfig | None], is_async: bool, joins: bool) -> None:
        self.hides = redactor is not None
        # Merging adds what the run around holds; a run with a thread of its own has nothing to do with that one's.
        self.config: RunnableConfig = {**merge_configs(*configs), "configurable": configurable(*configs)}
        self._variables: list[tuple[ContextVar[Any], Any]] = []
        self._tokens: list[tuple[ContextVar[Any], Token[Any]]] = []
        if redactor is None:
            return
        around = var_child_runnable_config.get()
        found = self.config.get("callbacks")
        if around and (joins or found is None):
            found = merge_configs({"callbacks": around.get("callbacks")}, {"callbacks": found}).get("callbacks")
        manager_class: type[BaseCallbackManager] = AsyncCallbackManager if is_async else CallbackManager
        # `configure` adds what the environment and the context ask for, so that nothing is left to be added unseen later.
        manager = cast(Any, manager_class).configure(found)
        views: dict[int, Any] = {}
        self.config = {**self.config, "callbacks": cast(BaseCallbackManager, _private(manager, views, redactor))}
        variables: list[ContextVar[Any]] = [tracing_v2_callback_var, *(hook[0] for hook in _configure_hooks)]
        self._variables = [(var, _view(var.get(), views, redactor)) for var in variables if var.get() is not None]
        if around:
            self._variables.append((var_child_runnable_config, {**around, "callbacks": None}))

    def __enter__(self) -> None:
        self._tokens = [(var, var.set(value)) for var, value in self._variables]

    def __exit__(self, *_: object) -> None:
        for var, token in reversed(self._tokens):
            var.reset(token)

    def each(self, parts: Iterator[T]) -> Generator[T]:
        """The parts of a run, each made inside the guard; what goes on between them is the caller's."""
        step: Callable[[], T] = partial(next, parts)
        while True:
            with self:
                try:
                    part = step()
                except StopIteration:
                    return
                except Exception as error:
                    self.rethrow(error)
            try:
                yield part
                step = partial(next, parts)
            except GeneratorExit:
                cast(Any, parts).close()
                raise
            except BaseException as error:
                step = partial(cast(Any, parts).throw, error)

    async def aeach(self, parts: AsyncIterator[T]) -> AsyncGenerator[T]:
        """The same, async."""
        step: Callable[[], Any] = parts.__anext__
        while True:
            with self:
                try:
                    part = await step()
                except StopAsyncIteration:
                    return
                except Exception as error:
                    self.rethrow(error)
            try:
                yield part
                step = parts.__anext__
            except GeneratorExit:
                await cast(Any, parts).aclose()
                raise
            except BaseException as error:
                step = partial(cast(Any, parts).athrow, error)

    def rethrow(self, error: Exception) -> NoReturn:
        """Raise a run's error, without its text where another library wrote it: the host's traces record what passes them."""
        if self.hides and isinstance(error, VispaError):
            _hide_causes(error)
        if not self.hides or isinstance(error, VispaError | GraphBubbleUp) or hasattr(error, "hides_text"):
            raise error
        raise without_text(error, keeps_original=True) from None


def _private(callbacks: Callbacks, views: dict[int, Any], redactor: Redactor) -> Callbacks:
    """The callbacks with a view for each handler, once each."""
    if isinstance(callbacks, BaseCallbackManager):
        manager = callbacks.copy()
        manager.handlers = _viewed(callbacks.handlers, views, redactor)
        manager.inheritable_handlers = _viewed(callbacks.inheritable_handlers, views, redactor)
        return manager
    return _viewed(callbacks or [], views, redactor)


def _viewed(handlers: Sequence[BaseCallbackHandler], views: dict[int, Any], redactor: Redactor) -> list[BaseCallbackHandler]:
    for handler in handlers:  # a handler may come twice, as it is and as the view that a guard around this one made of it
        if issubclass(type(handler), _View):
            views.setdefault(_key(handler), handler)
    return list({id(view): view for handler in handlers if (view := _view(handler, views, redactor))}.values())


def _view(handler: BaseCallbackHandler, views: dict[int, Any], redactor: Redactor) -> Any:
    # By inheritance: what feeds the caller's own stream is no trace, and an exporter may happen to have the same methods.
    if _StreamingCallbackHandler in type(handler).__mro__:
        return handler
    return views.setdefault(_key(handler), handler if issubclass(type(handler), _View) else _View(handler, redactor))


def _key(handler: BaseCallbackHandler) -> int:
    """The same for a handler, its views, and the copies of a tracer that share its runs."""
    runs = getattr(handler, "run_map", None)
    if runs is not None:
        return id(runs)
    return id(object.__getattribute__(handler, "_handler") if issubclass(type(handler), _View) else handler)
