"""FAISS indexes over unit vectors: exact up to a size, approximate beyond it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vispa_graph.taxonomy_index.encoder import Floats

EXACT_UP_TO = 50_000
# The most that rounding to bytes may take from an indexed vector, as a norm, which bounds its part in what a cosine moves by; those of MiniLM lose .012.
ROUNDING = 0.02
# A graph of small worlds over vectors of a byte per dimension. Chosen with python -m benchmarks.large_index --compare: an inverted file builds
# faster, but needs several times as long a search for the same recall.
KIND = "HNSW24,SQ8"
_CONSTRUCTION = 80  # breadth of the search while building
BREADTH = 192  # and while searching


@dataclass(frozen=True)
class VectorIndex:
    """A FAISS index over the inner product of unit vectors that all come at once.

    Up to `EXACT_UP_TO` vectors, a query is compared with every one. Search waits for memory: vectors whose components are of like size are rounded
    to a byte a dimension, and so is the query, which moves a cosine of MiniLM's by at most .003, the same on every machine; others are kept in half precision.

    Attributes:
        faiss: The index.
        scale: By what the vectors were multiplied before they were rounded; 0 where they were not.
    """

    faiss: Any
    scale: float

    @classmethod
    def build(cls, vectors: Floats) -> VectorIndex:
        """The index of unit vectors, [vectors, dimensions]."""
        if len(vectors) > EXACT_UP_TO:
            return cls(approximate_index(vectors), 0.0)
        import faiss

        scale = _byte_scale(vectors)
        rounded = np.round(vectors * scale)
        if np.linalg.norm(rounded / scale - vectors, axis=1).max(initial=0.0) > ROUNDING:
            return cls(exact_index(vectors), 0.0)
        index = faiss.IndexScalarQuantizer(vectors.shape[1], faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT)
        index.add(rounded)
        return cls(index, scale)

    def search(self, query: Floats, n: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Cosines and rows of the n nearest vectors to a query, [1, dimensions], both [1, n]; row -1 where there are fewer."""
        if not self.scale:
            scores, rows = search_vectors(self.faiss, query, n)
            return scores.clip(-1, 1), rows
        scale = _byte_scale(query)  # some of FAISS's kernels cut a query to whole numbers, others do not; rounded, all agree
        scores, rows = search_vectors(self.faiss, np.round(query * scale), n)
        return (scores / np.float32(self.scale * scale)).clip(-1, 1), rows


def _byte_scale(vectors: Floats) -> float:
    """What brings the largest component to 127."""
    return float(127 / max(float(np.abs(vectors).max(initial=0.0)), 1e-9))


def exact_index(vectors: Floats) -> Any:
    """An index that compares a query with every vector; in half precision, which reads half as much memory and moves a cosine by some 1e-4."""
    import faiss

    index = faiss.IndexScalarQuantizer(vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    return index


def approximate_index(vectors: Floats) -> Any:
    """An approximate index; the vectors added first, thousands of them, also fix the range of its bytes."""
    import faiss

    index = faiss.index_factory(vectors.shape[1], KIND, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _CONSTRUCTION  # type: ignore[attr-defined]
    index.train(vectors)
    index.add(vectors)
    return index


def read_mapped(path: Path) -> Any:
    """An index that stays on disk, mapped into memory; nothing can be added to it."""
    import faiss

    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def search_vectors(index: Any, queries: Floats, n: int, rows: npt.NDArray[np.bool_] | None = None) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Cosines and rows of the n nearest vectors to each query, [queries, n]; row -1 where there are fewer.

    Args:
        rows: Which rows may be found, [vectors]; None for all. Where they are few, all of them are compared.
    """
    import faiss

    n = max(1, min(n, index.ntotal))
    selector = None if rows is None else faiss.IDSelectorBitmap(np.packbits(rows, bitorder="little"))  # type: ignore[call-arg, arg-type]
    allowed = index.ntotal if rows is None else int(rows.sum())
    if isinstance(index, faiss.IndexHNSW) and allowed > EXACT_UP_TO:
        breadth = math.ceil(max(BREADTH, n) * index.ntotal / allowed)
        parameters: Any = faiss.SearchParametersHNSW(efSearch=breadth, sel=selector)  # type: ignore[attr-defined]
    else:
        index = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else index
        parameters = None if selector is None else faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
    found: tuple[Floats, npt.NDArray[np.int64]] = index.search(queries, n, params=parameters)
    return found
