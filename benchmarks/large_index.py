"""The phrase index at a million entries: recall against exact search, time a query on one core, time and memory to build.

python -m benchmarks.large_index                          # a million; about 6 GB of memory with the exact search it is compared with
python -m benchmarks.large_index --entries 50000
python -m benchmarks.large_index --compare HNSW24,SQ8 "IVF{cells},SQ8" "IVF{cells},PQ96"      # FAISS indexes of other kinds

No text is encoded: vectors are synthesised from the embeddings of the shipped phrases, each entry a mixture of two of them with noise.
"""

from __future__ import annotations

import argparse
import math
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table

from vispa_graph.taxonomy_index import Entry, PhraseIndex, SentenceEncoder
from vispa_graph.taxonomy_index.encoder import Floats
from vispa_graph.taxonomy_index.precomputed import FILE

BATCH = 50_000
QUERIES = 500
N = 40
NOISE = 0.5


def synthesised(n: int, seed: int) -> Floats:
    """Unit vectors near mixtures of two shipped phrases, [n, 384]; the noise has half their length."""
    from safetensors.numpy import load_file

    phrases = load_file(FILE)["vectors"].astype(np.float32)
    random = np.random.default_rng(seed)
    share = random.random((n, 1), dtype=np.float32)
    mixed = share * phrases[random.integers(len(phrases), size=n)] + (1 - share) * phrases[random.integers(len(phrases), size=n)]
    mixed += NOISE / math.sqrt(mixed.shape[1]) * random.standard_normal(mixed.shape, dtype=np.float32)
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def batches(entries: int) -> Iterator[tuple[int, Floats]]:
    for start in range(0, entries, BATCH):
        yield start, synthesised(min(BATCH, entries - start), seed=start + 1)


def exact_rows(entries: int, queries: Floats) -> np.ndarray:
    """The rows of the N nearest to each query, [queries, N], without holding all entries."""
    best, rows = np.full((len(queries), 0), -1.0, dtype=np.float32), np.zeros((len(queries), 0), dtype=np.int64)
    for start, batch in batches(entries):
        cosines = np.hstack([best, queries @ batch.T])
        numbers = np.hstack([rows, np.broadcast_to(np.arange(start, start + len(batch)), (len(queries), len(batch)))])
        order = np.argpartition(-cosines, min(N, cosines.shape[1] - 1), axis=1)[:, :N]
        best, rows = np.take_along_axis(cosines, order, 1), np.take_along_axis(numbers, order, 1)
    return rows


def recall(found: list[set[int]], exact: np.ndarray) -> float:
    return float(np.mean([len(rows & set(best.tolist())) / len(best) for rows, best in zip(found, exact, strict=True)]))


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(entries: int, queries: Floats, folder: Path) -> dict[str, Any]:
    encoder = SentenceEncoder()
    before, started = peak_gb(), time.perf_counter()
    making = 0.0
    index = PhraseIndex(folder, encoder)
    generator = batches(entries)
    while True:
        asked = time.perf_counter()
        part = next(generator, None)
        making += time.perf_counter() - asked
        if part is None:
            break
        start, batch = part
        index.add([Entry(str(start + i), f"phrase {start + i}", f"family {(start + i) % 7}") for i in range(len(batch))], batch)
    index.save()
    build = time.perf_counter() - started - making
    facts = {"index": "PhraseIndex", "build, s": build, "peak memory, GB": peak_gb(), "before, GB": before}
    opened = time.perf_counter()
    index = PhraseIndex(folder, encoder)
    facts["open, s"] = time.perf_counter() - opened
    facts["disk, GB"] = sum(path.stat().st_size for path in folder.iterdir()) / 2**30
    found, times = timed(lambda query: {int(hit.entry.id) for hit in index.search_vector(query, N)}, queries)
    _, filtered = timed(lambda query: index.search_vector(query, N, family="family 3"), queries)
    facts["filtered p50, ms"] = filtered
    return facts | {"found": found, "p50, ms": times}


def other(kind: str, entries: int, queries: Floats) -> list[dict[str, Any]]:
    """A FAISS index of another kind, built at once, at several breadths of the search (cells or candidates)."""
    everything = np.concatenate([batch for _, batch in batches(entries)])
    started = time.perf_counter()
    index = faiss.index_factory(everything.shape[1], kind.format(cells=int(4 * math.sqrt(entries))), faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efConstruction = 80
    if not index.is_trained:
        index.train(everything[:: max(1, len(everything) // 200_000)])
    index.add(everything)
    build = time.perf_counter() - started
    size = len(faiss.serialize_index(index)) / 2**30
    rows = []
    for breadth in (48, 96, 192, 384):
        if isinstance(index, faiss.IndexIVF):
            index.nprobe = breadth
        if isinstance(index, faiss.IndexHNSW):
            index.hnsw.efSearch = breadth
        found, times = timed(lambda query: set(index.search(query, N)[1][0].tolist()), queries)
        rows.append({"index": f"{kind}, {breadth}", "build, s": build, "disk, GB": size, "p50, ms": times, "found": found})
    return rows


def timed(search: Any, queries: Floats) -> tuple[list[Any], float]:
    """What a search finds, and its median time in ms, one query after the other on one core."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    found, seconds = [], []
    for query in queries:
        started = time.perf_counter()
        found.append(search(query[None]))
        seconds.append(time.perf_counter() - started)
    faiss.omp_set_num_threads(threads)
    return found, float(np.median(seconds)) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument(
        "--compare", nargs="*", default=[], metavar="KIND", help="FAISS factory strings to compare with; {cells} is 4 * sqrt(entries)."
    )
    arguments = parser.parse_args()
    queries = synthesised(QUERIES, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        rows = [ours(arguments.entries, queries, Path(folder) / "index")]  # first, so that the peak is its own
    for kind in arguments.compare:
        rows += other(kind, arguments.entries, queries)
    exact = exact_rows(arguments.entries, queries)
    columns = ["build, s", "peak memory, GB", "before, GB", "disk, GB", "open, s", "p50, ms", "filtered p50, ms"]
    table = Table(title=f"{arguments.entries:,} entries, {QUERIES} queries")
    for column in ("index", f"recall@{N}", *columns):
        table.add_column(column, justify="left" if column == "index" else "right")
    for row in rows:
        table.add_row(row["index"], f"{recall(row['found'], exact):.4f}", *(f"{row[c]:.2f}" if c in row else "" for c in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
