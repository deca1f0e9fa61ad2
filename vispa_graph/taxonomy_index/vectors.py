"""FAISS indexes over unit vectors: exact up to a size, approximate beyond it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vispa_graph.taxonomy_index.encoder import Floats

EXACT_UP_TO = 50_000
# A graph of small worlds over vectors of a byte per dimension. Chosen with python -m benchmarks.large_index --compare: an inverted file builds
# faster, but needs several times as long a search for the same recall.
KIND = "HNSW24,SQ8"
_CONSTRUCTION = 80  # breadth of the search while building
BREADTH = 192  # and while searching


def vector_index(vectors: Floats) -> Any:
    """A FAISS index over the inner product of unit vectors, [vectors, dimensions]."""
    return approximate_index(vectors) if len(vectors) > EXACT_UP_TO else exact_index(vectors)


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
