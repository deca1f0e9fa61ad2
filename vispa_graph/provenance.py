"""What a run was made with, kept in its state by value, so that nothing made with other settings is mixed into it.

A thread is often resumed in another process, hours later. Its finished comments are kept as they are; going on with another model, or
at another strength, would put two systems into one answer without a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from langchain_core.runnables import RunnableConfig

from vispa_graph.errors import ResumeError
from vispa_graph.state import State

if TYPE_CHECKING:
    from vispa_graph.resources import Resources

N = TypeVar("N")

# Settings that say where and how fast something runs, what is traced, or that stand in `made_with` by their content.
NOT_DECISIVE = frozenset(
    {"device", "device_map", "trust_remote_code", "cache", "linger_ms", "batch_tokens", "packed_gigabytes", "queue_size", "timeout", "trace_content"}
    | {"values", "shipped_values", "encoder"}
)


def describe(resources: Resources) -> dict[str, Any]:
    """Everything that decides what a run says, the engine's weights apart: plain data, found without loading a model."""
    settings = resources.settings.model_dump(mode="json", exclude=set(NOT_DECISIVE))
    return settings | {
        "taxonomy": resources.taxonomy.fingerprint,
        "encoder": [getattr(encoder, "fingerprint", "") for encoder in (resources.encoder, resources.value_encoder)],
        "main_llm": _model_name(resources),
        "profile": repr(resources.profile),  # what settings left at None stand for
    }


def engine_of(resources: Resources) -> dict[str, Any]:
    """The engine's weights; loads the model."""
    return {"engine": resources.engine.fingerprint}


def refuse_other_settings(begun_with: Mapping[str, Any], resources: Resources) -> None:
    """Let a run go on only with what it was begun with.

    Raises:
        ResumeError: Names the settings that differ.
    """
    now = resources.made_with | (engine_of(resources) if "engine" in begun_with else {})
    differ = sorted(key for key in now.keys() | begun_with.keys() if now.get(key) != begun_with.get(key))
    if differ:
        raise ResumeError(
            f"This run was begun with another {', '.join(differ)} than the graph has that is to go on with it. "
            "Resume it with a graph of the same settings and models, or ask again: a new turn takes the settings of its graph."
        )


def of_one_run(node: Callable[..., N], resources: Resources) -> Callable[..., N]:
    """The node on these resources, refusing the state of a run that was begun with others."""

    def checked(state: State, config: RunnableConfig) -> N:
        refuse_other_settings(state["made_with"], resources)
        return node(state, config, resources=resources)

    return checked


def _model_name(resources: Resources) -> str | None:
    """Provider and name of the caller's own main language model, as viewers show them."""
    if resources.main_llm is None:
        return None
    known = resources.main_llm._get_ls_params()
    return f"{known.get('ls_provider', '')}:{known.get('ls_model_name', '')}"
