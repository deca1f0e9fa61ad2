"""An index of a user's own phrases (values, rights, duties), up to a million of them, kept in a folder.

Exact up to `vectors.EXACT_UP_TO` entries; beyond that an approximate index, memory-mapped, holds most of them, and an exact one the latest.
A database holds the entries and says which vector files belong to them. A save writes new files beside the old ones and then commits, so
that whatever stops it, the folder holds the index as it was before or after.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vispa_graph.errors import InputError, StoreError
from vispa_graph.taxonomy_index.encoder import Encoder, Floats
from vispa_graph.taxonomy_index.vectors import EXACT_UP_TO, approximate_index, exact_index, read_mapped, search_vectors

_FORMAT = 1
_ENTRIES = "entries.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS entries (row INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, family TEXT NOT NULL, text TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_family ON entries (family, row);
CREATE TABLE IF NOT EXISTS manifest (content TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A phrase of a taxonomy.

    Attributes:
        id: Unique in the index.
        text: What is compared with queries.
        family: What results can be filtered by.
    """

    id: str
    text: str
    family: str = ""


@dataclass(frozen=True, slots=True)
class EntryHit:
    """An entry and its cosine to the query, -1..1; up to a percent off where the entry lies in the approximate part."""

    entry: Entry
    score: float


class PhraseIndex:
    """Search over the entries of a folder. Safe to share between threads; one process may add at a time, any number may search.

    Args:
        folder: Where the index lies; made by the first `save`.
        encoder: The encoder of entries and queries.

    Raises:
        StoreError: The folder holds something that is damaged or was made with another encoder.
    """

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self.folder = folder
        self._encoder = encoder
        self._lock = threading.RLock()
        self._generation = 0
        self._saved = 0
        self._main: Any = None
        self._main_file: str | None = None
        self._writable = True  # whether the main index is in memory, and not mapped
        self._tail: Any = None
        self._pending: list[Entry] = []
        self._pending_ids: set[str] = set()
        self._members: dict[str, npt.NDArray[np.bool_]] = {}
        if (folder / _ENTRIES).exists():
            self._open()

    def __len__(self) -> int:
        return self._saved + len(self._pending)

    def add(self, entries: Iterable[Entry], vectors: Floats | None = None) -> None:
        """Add entries. They can be found at once, and last from the next `save` on.

        Args:
            entries: With ids that are not in the index yet.
            vectors: Their unit vectors, [entries, dimensions]; None to encode them.

        Raises:
            InputError: An id is taken, or entries and vectors differ in number.
        """
        new = list(entries)
        if vectors is not None and len(vectors) != len(new):
            raise InputError(f"There are {len(new)} entries, but {len(vectors)} vectors. Give one for each, or none to have them encoded.")
        if not new:
            return
        with self._lock:
            taken = self._taken([entry.id for entry in new])
            if taken:
                raise InputError(f"{taken} of the {len(new)} ids are in the index already or occur twice. Give each entry an id of its own.")
            encoded = self._encoder.encode([entry.text for entry in new]) if vectors is None else np.ascontiguousarray(vectors, dtype=np.float32)
            if self._tail is None:
                self._tail = exact_index(encoded)
            else:
                self._tail.add(encoded)
            self._pending += new
            self._pending_ids.update(entry.id for entry in new)
            self._members.clear()
            if self._tail.ntotal > EXACT_UP_TO:
                self._fold()

    def search(self, query: str, n: int = 40, *, family: str | None = None) -> list[EntryHit]:
        """The n entries nearest to a query, best first; with a family, only that family's."""
        return self.search_vector(self._encoder.encode([query]), n, family=family)

    def search_vector(self, vector: Floats, n: int = 40, *, family: str | None = None) -> list[EntryHit]:
        """The same for an encoded query, [1, dimensions]."""
        with self._lock:
            members = None if family is None else self._members_of(family)
            found: list[tuple[float, int]] = []
            split = self._main.ntotal if self._main is not None else 0
            for index, first in ((self._main, 0), (self._tail, split)):
                if index is None or not index.ntotal:
                    continue
                rows = None if members is None else members[first : first + index.ntotal]
                if rows is not None and not rows.any():
                    continue
                scores, places = search_vectors(index, vector, n, rows)
                found += [(-round(float(s), 5), first + int(p)) for s, p in zip(scores[0], places[0], strict=True) if p >= 0]
            best = sorted(found)[:n]
            entries = self._entries([row for _, row in best])
        return [EntryHit(entry, -score) for (score, _), entry in zip(best, entries, strict=True)]

    def save(self) -> None:
        """Make everything added so far last. Whatever stops this halfway, the folder can be read, as it was before or after.

        Raises:
            StoreError: Another process has saved to the folder meanwhile.
        """
        with self._lock:
            if not self._pending:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            generation, count = self._generation + 1, len(self)
            with closing(_connect(self.folder)) as database:
                database.execute("BEGIN IMMEDIATE")  # from here on no other process can save
                if (_manifest(database) or {"generation": 0})["generation"] != self._generation:
                    raise StoreError(f"Another process has saved to {self.folder} since it was opened here. Open it and add the entries again.")
                rows = ((self._saved + number, e.id, e.family, e.text) for number, e in enumerate(self._pending))
                database.executemany("INSERT INTO entries VALUES (?, ?, ?, ?)", rows)
                main, tail = self._main_file, None
                if self._main is not None and self._writable:
                    main = f"main-{generation}.faiss"
                    _write(self._main, self.folder / main)
                if self._tail.ntotal:
                    tail = f"tail-{generation}.faiss"
                    _write(self._tail, self.folder / tail)
                files = {name: (self.folder / name).stat().st_size for name in (main, tail) if name}
                manifest = {"format": _FORMAT, "encoder": self._encoder.fingerprint, "generation": generation, "entries": count}
                manifest |= {"main": main, "tail": tail, "bytes": files}
                database.execute("DELETE FROM manifest")
                database.execute("INSERT INTO manifest VALUES (?)", (json.dumps(manifest),))
                database.execute("COMMIT")
            self._generation, self._saved = generation, count
            self._pending, self._pending_ids = [], set()
            if main is not None and main != self._main_file:
                self._main = read_mapped(self.folder / main)
                self._main_file, self._writable = main, False
            for path in self.folder.glob("*.faiss"):
                if path.name not in files:
                    path.unlink(missing_ok=True)

    def _open(self) -> None:
        import faiss

        remedy = f"Restore the folder {self.folder} from a copy, or remove it and add the entries again."
        try:
            with closing(_connect(self.folder)) as database:
                database.execute("BEGIN")  # a process that saves meanwhile removes no file before this one is read
                manifest = _manifest(database)
                if manifest is None:  # the first save was stopped
                    return
                if manifest["format"] != _FORMAT or manifest["encoder"] != self._encoder.fingerprint:
                    raise StoreError(
                        f"The index in {self.folder} was made with another encoder or version. Open it with that, or use another folder."
                    )
                for name, size in manifest["bytes"].items():
                    if (self.folder / name).stat().st_size != size:
                        raise StoreError(f"The index in {self.folder} is damaged: {name} does not have the size that it was saved with. {remedy}")
                if manifest["main"]:
                    self._main = read_mapped(self.folder / manifest["main"])
                    self._main_file, self._writable = manifest["main"], False
                if manifest["tail"]:
                    self._tail = faiss.read_index(str(self.folder / manifest["tail"]))
                elif self._main is not None:
                    self._tail = exact_index(np.empty((0, self._main.d), dtype=np.float32))
                (count,) = database.execute("SELECT count(*) FROM entries").fetchone()
            self._generation, self._saved = manifest["generation"], manifest["entries"]
            held = sum(index.ntotal for index in (self._main, self._tail) if index is not None)
            if not count == held == self._saved:
                raise StoreError(f"The index in {self.folder} is damaged: it holds {held} vectors for {count} entries. {remedy}")
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, sqlite3.Error) as error:
            raise StoreError(f"The index in {self.folder} cannot be read ({type(error).__name__}). {remedy}") from error

    def _fold(self) -> None:
        """Move the tail into the main index."""
        import faiss

        if self._main is not None and not self._writable:
            self._main = faiss.read_index(str(self.folder / str(self._main_file)))
            self._writable = True
        vectors = self._tail.reconstruct_n(0, self._tail.ntotal)
        if self._main is None:
            self._main = approximate_index(vectors)
        else:
            self._main.add(vectors)
        self._tail = exact_index(vectors[:0])

    def _taken(self, ids: Sequence[str]) -> int:
        """How many of the ids occur twice or are in the index."""
        wanted = set(ids)
        taken = len(ids) - len(wanted) + len(wanted & self._pending_ids)
        if self._saved:
            with closing(_connect(self.folder)) as database:
                found = (database.execute("SELECT 1 FROM entries WHERE id = ?", (i,)).fetchone() for i in wanted)
                taken += sum(row is not None for row in found)
        return taken

    def _entries(self, rows: Sequence[int]) -> list[Entry]:
        """The entries of rows, in that order."""
        stored: dict[int, Entry] = {}
        saved = [row for row in rows if row < self._saved]
        if saved:
            with closing(_connect(self.folder)) as database:
                marks = ",".join("?" * len(saved))
                for row, id_, family, text in database.execute(f"SELECT row, id, family, text FROM entries WHERE row IN ({marks})", saved):
                    stored[row] = Entry(id_, text, family)
        return [stored[row] if row < self._saved else self._pending[row - self._saved] for row in rows]

    def _members_of(self, family: str) -> npt.NDArray[np.bool_]:
        """Which rows belong to a family, [entries]."""
        if family not in self._members:
            members = np.zeros(len(self), dtype=bool)
            if self._saved:
                with closing(_connect(self.folder)) as database:
                    found = database.execute("SELECT row FROM entries WHERE family = ? AND row < ?", (family, self._saved))
                    members[np.fromiter((row for (row,) in found), dtype=np.int64)] = True
            members[self._saved :] = [entry.family == family for entry in self._pending]
            self._members[family] = members
        return self._members[family]


def _connect(folder: Path) -> sqlite3.Connection:
    """A connection to the entries; what is not committed when it closes is undone."""
    connection = sqlite3.connect(folder / _ENTRIES, isolation_level=None, timeout=60)
    connection.executescript(_TABLES)
    return connection


def _manifest(database: sqlite3.Connection) -> dict[str, Any] | None:
    """Which files hold the vectors of the entries; None before the first save."""
    found = database.execute("SELECT content FROM manifest").fetchone()
    return json.loads(found[0]) if found else None


def _write(index: Any, path: Path) -> None:
    """Write an index and see it onto the disk."""
    import faiss

    faiss.write_index(index, str(path))
    with path.open("rb") as file:
        os.fsync(file.fileno())
