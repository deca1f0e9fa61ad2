"""Plural answers to value-laden questions, by steering the activations of a language model.

Importing this package loads no model and no model library: the public names are found on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vispa_graph.chat_model import SteeredChatModel
    from vispa_graph.engine.contract import Engine
    from vispa_graph.engine.fake import FakeEngine
    from vispa_graph.engine.huggingface import HuggingFaceEngine
    from vispa_graph.errors import VispaError
    from vispa_graph.graph import create_graph
    from vispa_graph.plural_graph import PluralGraph
    from vispa_graph.select import select_values
    from vispa_graph.settings import Settings
    from vispa_graph.state import Input, Output
    from vispa_graph.taxonomy_index import Taxonomy, TaxonomyIndex
    from vispa_graph.tool import as_tool

__version__ = "0.1.0"

__all__ = [
    "Engine", "FakeEngine", "HuggingFaceEngine", "Input", "Output", "PluralGraph", "Settings", "SteeredChatModel", "Taxonomy",
    "TaxonomyIndex", "VispaError", "as_tool", "create_graph", "select_values",
]  # fmt: skip

_HOMES = {
    "Engine": "engine.contract",
    "FakeEngine": "engine.fake",
    "HuggingFaceEngine": "engine.huggingface",
    "Input": "state",
    "Output": "state",
    "PluralGraph": "plural_graph",
    "Settings": "settings",
    "SteeredChatModel": "chat_model",
    "Taxonomy": "taxonomy_index",
    "TaxonomyIndex": "taxonomy_index",
    "VispaError": "errors",
    "as_tool": "tool",
    "create_graph": "graph",
    "select_values": "select",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "errors"])
