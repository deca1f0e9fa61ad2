"""Where a model lies: what can be said before anything heavy is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vispa_graph.errors import ModelNotFoundError


def find_model(model: str) -> str:
    """The folder of a model, or its name on the hub, which is not looked up.

    Raises:
        ModelNotFoundError: A folder that does not exist, or that holds no config.json.
    """
    folder = Path(os.path.expanduser(model))  # which leaves the home of nobody as it is
    if not os.path.isdir(folder):  # False too where the system would not even look, as for a name that is too long
        if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise ModelNotFoundError(f"There is no folder {model}. Give the folder of a saved model, or a name such as Qwen/Qwen3-4B.")
        return model
    if not os.path.isfile(folder / "config.json"):
        raise ModelNotFoundError(f"The folder {model} holds no config.json, so it is no saved model. Give the folder that save_pretrained wrote.")
    return str(folder)


def depth_of(folder: str) -> int | None:
    """The number of decoder blocks where the configuration in a model's folder tells it in so many words; else None."""
    try:
        config = json.loads((Path(os.path.expanduser(folder)) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    depth = config.get("num_hidden_layers") if isinstance(config, dict) else None
    return depth if isinstance(depth, int) else None


def is_fetched(model: str, revision: str | None = None) -> bool:
    """Whether the weights of a model are on this machine, in a folder or whole in the hub's cache."""
    if os.path.isdir(os.path.expanduser(model)):
        return True
    from huggingface_hub import try_to_load_from_cache  # costs a fraction of a second; only here

    def cached(file: str) -> str | None:
        found = try_to_load_from_cache(model, file, revision=revision)
        return found if isinstance(found, str) else None

    try:
        if cached("model.safetensors"):
            return True
        index = cached("model.safetensors.index.json")
        parts = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values() if index else []
    except (OSError, ValueError, KeyError):  # no name that a hub would take, or a damaged index
        return False
    return bool(parts) and all(cached(part) for part in set(parts))
