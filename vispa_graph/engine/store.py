"""Fitted directions on disk: safetensors files that are never changed, beside a manifest that says what they belong to.

A file holds some values at some blocks and is named by the digest of its content. Adding a value, or a block, adds a file. So any
number of processes can fit and read at once without a lock, and a fit that broke off keeps the values that were finished. While a fit
sets values against each other, the states it has read lie in a folder beside them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vispa_graph.engine.contract import Direction, Engine, Floats, Method
from vispa_graph.errors import StoreError
from vispa_graph.storage import write_atomic

if TYPE_CHECKING:
    from vispa_graph.engine.directions import FitSettings
    from vispa_graph.engine.pairs import Prompt

_log = logging.getLogger(__name__)
_FORMAT = 2
_MANIFEST, _SUFFIX, _ENTRIES = "manifest.json", ".safetensors", "directions"
_READING = "reading"


def manifest_key(engine: Engine, settings: FitSettings, *, revision: str | None = None, dictionary: str | None = None) -> dict[str, Any]:
    """What a folder of directions belongs to. What is read for a value, and at which blocks, is kept beside each value instead.

    Args:
        revision: Of the model, as it was asked for.
        dictionary: Fingerprint of the dictionary that `sae` fits with.
    """
    return {
        "format": _FORMAT,
        "model": engine.fingerprint,
        "revision": revision,
        "method": settings.method,
        "contrast": settings.contrast,
        "reading": settings.reading,
        "regularisation": settings.regularisation,
        "solver": settings.solver,
        "dictionary": dictionary,
    }


def folder_name(key: Mapping[str, Any]) -> str:
    """A folder name for a key: its SHA-256, shortened."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def is_for(folder: Path, key: Mapping[str, Any]) -> bool:
    """Whether a folder of directions belongs to a key; a folder that is not there does not."""
    try:
        return bool(_read_manifest(folder)["key"] == dict(key))
    except StoreError:
        return False


@dataclass(frozen=True)
class _Entry:
    """Where in which file the directions of a value lie."""

    file: Path
    number: int
    layers: tuple[int, ...]


class DirectionStore:
    """The directions of one model fitted in one way. Files are memory-mapped, and checked when they are first used.

    Args:
        folder: Made with its manifest when something is added.
        key: See `manifest_key`.
        model_name: For people who read the manifest.
        shipped: A second folder, only read, and only where it belongs to the same key.

    Raises:
        StoreError: The folder is damaged, or belongs to something else.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], *, model_name: str, shipped: Path | None = None) -> None:
        self.folder = folder
        self._manifest = {"key": dict(key), "model_name": model_name}
        # By value and by the digest of what was read for it.
        self._entries: dict[tuple[str, str], list[_Entry]] = {}
        self._checked: set[Path] = set()
        if shipped is not None and is_for(shipped, key):
            self._index(shipped)
        # Another process may be just about to write the manifest of a folder that it made.
        if (folder / _MANIFEST).exists() or any(folder.glob(f"[!.]*{_SUFFIX}")):
            stored = _read_manifest(folder)["key"]
            if different := sorted(name for name in {*stored, *key} if stored.get(name) != key.get(name)):
                raise StoreError(f"The stored directions in {folder} belong to something else: {', '.join(different)} differ. {_remedy(folder)}")
            self._index(folder)

    def layers(self, value: str, source: str) -> frozenset[int]:
        """The blocks at which a value is there, fitted from what `source` is the digest of."""
        return frozenset(layer for entry in self._entries.get((value, source), ()) for layer in entry.layers)

    @property
    def sources(self) -> list[tuple[str, str]]:
        """The value and the digest of what was read for it, of all that is there."""
        return list(self._entries)

    def begin(self) -> None:
        """Make the folder with its manifest: one that cannot be written to is found out before anything is read for it."""
        if not (self.folder / _MANIFEST).exists():
            write_atomic(self.folder / _MANIFEST, json.dumps(self._manifest, indent=1).encode())

    def add(self, direction: Direction, source: str) -> None:
        """Keep a direction at its blocks."""
        self.add_all([(direction, source)])

    def add_all(self, directions: Sequence[tuple[Direction, str]]) -> None:
        """Keep directions, each with the digest of what was read for it, in one file.

        Raises:
            StoreError: One holds numbers that are not finite.
        """
        from safetensors.numpy import save

        tensors: dict[str, Floats] = {}
        for number, (direction, _) in enumerate(directions):
            found = {"vectors": direction.vectors, "bias": direction.bias, "accuracy": direction.accuracy}
            if direction.held_out is not None:
                found["held_out"] = direction.held_out
            if not all(np.isfinite(array).all() for array in found.values()):
                raise StoreError(
                    f"The direction of {direction.value} holds numbers that are not finite, so it is not kept. Try dtype float32, or another method."
                )
            tensors |= {f"{number}.{name}": np.ascontiguousarray(array) for name, array in found.items()}
        entries = [{"value": d.value, "source": source, "layers": list(d.layers)} for d, source in directions]
        content = save(tensors, {_ENTRIES: json.dumps(entries)})
        self.begin()
        path = self.folder / f"{_digest(content)}{_SUFFIX}"
        write_atomic(path, content)
        self._index_file(path)

    def load(self, value: str, source: str, method: Method, layers: Sequence[int]) -> Direction:
        """A direction that is there at all these blocks, with a magnitude of 1.

        Raises:
            StoreError: A file is damaged, or holds numbers that are not finite.
        """
        rows: dict[str, list[Floats]] = {"vectors": [], "bias": [], "accuracy": [], "held_out": []}
        order: list[int] = []
        for entry in self._entries[value, source]:
            wanted = [layer for layer in layers if layer in entry.layers and layer not in order]
            if wanted:
                order += wanted
                for name, array in self._read(entry, wanted).items():
                    rows[name].append(array)
        sorting = np.argsort(order)

        def joined(name: str) -> Floats:
            # One file is the rule, and stays a view of the mapped file.
            return rows[name][0] if len(rows[name]) == 1 else np.concatenate(rows[name])[sorting]

        held_out = joined("held_out") if len(rows["held_out"]) == len(rows["vectors"]) else None
        return Direction(value, method, tuple(layers), joined("vectors"), joined("bias"), 1.0, joined("accuracy"), held_out)

    def _index(self, folder: Path) -> None:
        # In a fixed order, so that of two equal fits every process takes the same.
        for path in sorted(folder.glob(f"[!.]*{_SUFFIX}")):
            self._index_file(path)

    def _index_file(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                entries = json.loads(file.metadata()[_ENTRIES])
            for number, entry in enumerate(entries):
                where = self._entries.setdefault((str(entry["value"]), str(entry["source"])), [])
                where.append(_Entry(path, number, tuple(map(int, entry["layers"]))))
        except (OSError, KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            raise StoreError(f"The stored directions in {path} cannot be read ({type(error).__name__}). {_remedy(path)}") from error

    def _read(self, entry: _Entry, layers: Sequence[int]) -> dict[str, Floats]:
        """The arrays of an entry at some of its blocks, views of the mapped file where those lie side by side."""
        from safetensors import SafetensorError, safe_open

        try:
            if entry.file not in self._checked and _digest(entry.file.read_bytes()) != entry.file.stem:
                raise StoreError(f"The stored directions in {entry.file} are damaged: they are not what was written. {_remedy(entry.file)}")
            with safe_open(entry.file, framework="pt") as file:
                arrays = {
                    name: file.get_tensor(key).numpy()
                    for name in ("vectors", "bias", "accuracy", "held_out")
                    if (key := f"{entry.number}.{name}") in file.keys()  # noqa: SIM118, the file is no mapping
                }
        except (OSError, TypeError, ValueError, SafetensorError) as error:
            raise StoreError(f"The stored directions in {entry.file} cannot be read ({type(error).__name__}). {_remedy(entry.file)}") from error
        if problem := _problem(arrays, len(entry.layers)):
            raise StoreError(f"The stored directions in {entry.file} {problem}. {_remedy(entry.file)}")
        self._checked.add(entry.file)
        places = [entry.layers.index(layer) for layer in layers]
        if places == list(range(places[0], places[0] + len(places))):
            return {name: array[places[0] : places[0] + len(places)] for name, array in arrays.items()}
        return {name: array[places] for name, array in arrays.items()}


class StateStore:
    """States read for a fit that is under way, so that one that broke off does not read them again. Removed when the fit is done.

    Its files are named by what was read and by the digest of their content. They may be gone at any time: another process that finishes
    the same fit removes them.

    Args:
        folder: Of the directions that are fitted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / _READING

    def load(self, prompts: Sequence[Prompt], layers: Sequence[int]) -> Floats | None:
        """The states [prompts, L, d]; None where they are not there as they were written."""
        from safetensors.numpy import load

        try:
            for path in sorted(self._folder.glob(f"{_read_for(prompts, layers)}-*{_SUFFIX}")):
                content = path.read_bytes()
                if path.stem.endswith(f"-{_digest(content)}"):
                    return load(content)[_READING]
        except OSError as error:  # removed just now
            _log.debug("Kept states cannot be read (%s).", type(error).__name__)
        return None

    def keep(self, prompts: Sequence[Prompt], layers: Sequence[int], states: Floats) -> None:
        """Write states [prompts, L, d], if that can be done: the fit goes on without, too."""
        from safetensors.numpy import save

        content = save({_READING: np.ascontiguousarray(states)})
        try:
            write_atomic(self._folder / f"{_read_for(prompts, layers)}-{_digest(content)}{_SUFFIX}", content)
        except OSError as error:  # no space, or another process that has finished removes the folder just now
            _log.debug("States are not kept (%s).", type(error).__name__)

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest["key"], dict):
            raise TypeError
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"The stored directions in {folder} cannot be read ({type(error).__name__}). {_remedy(folder)}") from error
    return dict(manifest)


def _problem(arrays: Mapping[str, Floats], layers: int) -> str | None:
    """What is wrong with the arrays of a direction, if anything."""
    if not {"vectors", "bias", "accuracy"} <= set(arrays):
        return "lack some of their arrays"
    if arrays["vectors"].ndim != 2 or any(len(array) != layers or (name != "vectors" and array.ndim != 1) for name, array in arrays.items()):
        return "have other shapes than their layers ask for"
    return None if all(np.isfinite(array).all() for array in arrays.values()) else "hold numbers that are not finite"


def _read_for(prompts: Sequence[Prompt], layers: Sequence[int]) -> str:
    """What names the states of prompts at some blocks."""
    return _digest(json.dumps([prompts, list(layers)]).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _remedy(path: Path) -> str:
    return f"Remove {path} and what it held is fitted again."
