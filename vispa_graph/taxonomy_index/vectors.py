"""FAISS indexes over unit vectors: exact up to a size, approximate beyond it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from vispa_graph.taxonomy_index.encoder import Floats

EXACT_UP_TO = 50_000
# Cells looked into, of 4 * sqrt(n). Chosen by python -m benchmarks.large_index: the smallest with recall@40 well above .95.
PROBES = 48
_TRAINED_ON = 48  # vectors a cell
_BLOCK = 65_536
_EXACT, _APPROXIMATE = "Flat", "IVF{cells},SQ8"


def vector_index(vectors: Floats) -> Any:
    """A FAISS index over the inner product of unit vectors, [vectors, dimensions]."""
    return approximate_index(vectors) if len(vectors) > EXACT_UP_TO else exact_index(vectors)


def exact_index(vectors: Floats) -> Any:
    """A flat index."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def approximate_index(vectors: Any) -> Any:
    """An inverted file of 4 * sqrt(n) cells, a byte per dimension: a quarter of the memory, and exact within the cells but for rounding.

    Args:
        vectors: Anything that has a length and gives float32 rows for a slice, [vectors, dimensions]; read block by block.
    """
    import faiss

    n = len(vectors)
    cells = max(1, int(4 * math.sqrt(n)))
    step = max(1, n // (cells * _TRAINED_ON))
    sample = np.concatenate([vectors[start : start + _BLOCK][::step] for start in range(0, n, _BLOCK)])
    index = faiss.index_factory(sample.shape[1], _APPROXIMATE.format(cells=cells), faiss.METRIC_INNER_PRODUCT)
    index.train(sample)
    del sample
    for start in range(0, n, _BLOCK):
        index.add(vectors[start : start + _BLOCK])
    return index


def search_vectors(index: Any, queries: Floats, n: int, rows: npt.NDArray[np.bool_] | None = None) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Cosines and rows of the n nearest vectors to each query, [queries, n]; row -1 where there are fewer.

    Args:
        rows: Which rows may be found, [vectors]; None for all. The fewer they are, the more cells are looked into.
    """
    import faiss

    n = max(1, min(n, index.ntotal))
    selector = None if rows is None else faiss.IDSelectorBitmap(np.packbits(rows, bitorder="little"))  # type: ignore[call-arg, arg-type]
    if isinstance(index, faiss.IndexIVF):
        share = 1.0 if rows is None else max(float(rows.mean()), 1e-9)
        parameters: Any = faiss.SearchParametersIVF(nprobe=min(index.nlist, math.ceil(PROBES / share)), sel=selector)  # type: ignore[call-arg]
    else:
        parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
    found: tuple[Floats, npt.NDArray[np.int64]] = index.search(queries, n, params=parameters)
    return found
