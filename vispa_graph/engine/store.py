"""Fitted directions on disk: safetensors beside a manifest that says what they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vispa_graph.engine.contract import Direction
from vispa_graph.engine.directions import FitSettings
from vispa_graph.errors import StoreError
from vispa_graph.storage import atomic_folder

_FORMAT = 1
_TENSORS, _MANIFEST = "directions.safetensors", "manifest.json"


def manifest_key(model_fingerprint: str, taxonomy_fingerprint: str, settings: FitSettings) -> dict[str, Any]:
    """What directions belong to: only directions with an equal key may be used."""
    return {"format": _FORMAT, "model": model_fingerprint, "taxonomy": taxonomy_fingerprint, **asdict(settings), "layers": list(settings.layers)}


def folder_name(key: Mapping[str, Any]) -> str:
    """A folder name for a key: its SHA-256, shortened."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def save_directions(folder: Path, directions: Mapping[str, Direction], key: Mapping[str, Any], *, model_name: str) -> None:
    """Write directions and manifest; the folder appears whole or not at all."""
    tensors = {}
    for value, direction in directions.items():
        tensors[f"{value}.vectors"] = direction.vectors
        tensors[f"{value}.bias"] = direction.bias
        tensors[f"{value}.accuracy"] = direction.accuracy
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / _TENSORS)
        manifest = {
            "key": dict(key),
            "model_name": model_name,
            "sha256": hashlib.sha256((temporary / _TENSORS).read_bytes()).hexdigest(),
            "values": {value: {"alpha": d.alpha, "accuracy": [round(float(a), 4) for a in d.accuracy]} for value, d in directions.items()},
        }
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def is_for(folder: Path, key: Mapping[str, Any]) -> bool:
    """Whether a folder of directions belongs to a key; a folder that is not there does not."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("key") == dict(key)


def load_directions(folder: Path, key: Mapping[str, Any]) -> dict[str, Direction]:
    """Read directions back.

    Raises:
        StoreError: The folder is incomplete or corrupt, or belongs to another model, taxonomy or method.
    """
    remedy = f"Remove the folder {folder} and they are fitted again."
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        content = (folder / _TENSORS).read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
            raise StoreError(f"The stored directions in {folder} are damaged: their checksum differs from the manifest's. {remedy}")
        different = [name for name in key if manifest["key"].get(name) != key[name]]
        if different:
            raise StoreError(f"The stored directions in {folder} belong to something else: {', '.join(different)} differ. {remedy}")
        tensors = load_file(folder / _TENSORS)
        directions = {
            value: Direction(
                value=value,
                method=key["method"],
                layers=tuple(key["layers"]),
                vectors=tensors[f"{value}.vectors"],
                bias=tensors[f"{value}.bias"],
                alpha=float(entry["alpha"]),
                accuracy=tensors[f"{value}.accuracy"],
            )
            for value, entry in manifest["values"].items()
        }
    except (OSError, KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise StoreError(f"The stored directions in {folder} cannot be read ({type(error).__name__}). {remedy}") from error
    if len(tensors) != 3 * len(directions):
        raise StoreError(f"The stored directions in {folder} are not those that their manifest lists. {remedy}")
    for direction in directions.values():
        if problem := _problem(direction):
            raise StoreError(f"The stored directions in {folder} {problem}. {remedy}")
    return directions


def _problem(direction: Direction) -> str | None:
    """What is wrong with a direction's numbers, if anything."""
    arrays = (direction.vectors, direction.bias, direction.accuracy)
    if not all(np.isfinite(array).all() for array in (*arrays, direction.alpha)):
        return "hold numbers that are not finite"
    layers = (len(direction.layers),)
    if direction.vectors.ndim != 2 or direction.vectors.shape[:1] != layers or direction.bias.shape != layers or direction.accuracy.shape != layers:
        return "have other shapes than their layers ask for"
    return None
