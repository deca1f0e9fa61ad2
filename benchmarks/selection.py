"""How well the values at stake are found, on labelled situations apart from the bank of concerns.

python -m benchmarks.selection           # the test half
python -m benchmarks.selection --half tune
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from vispa_graph.taxonomy_index import Hit, SentenceEncoder, Taxonomy, TaxonomyIndex, rank
from vispa_graph.taxonomy_index.retriever import CANDIDATES

DATA = Path(__file__).parent / "data" / "labelled_situations.yaml"
LOOK_ALIKE = 0.6
K = 6


def grades(situation: dict[str, Any]) -> dict[str, int]:
    return dict.fromkeys(situation["relevant"], 1) | dict.fromkeys(situation["central"], 2)


def ndcg(order: Sequence[str], grade: dict[str, int]) -> float:
    """Normalised discounted cumulative gain of the first K values; linear gains 0, 1, 2."""
    gain = sum(grade.get(value, 0) / math.log2(place + 2) for place, value in enumerate(order[:K]))
    ideal = sum(g / math.log2(place + 2) for place, g in enumerate(sorted(grade.values(), reverse=True)[:K]))
    return gain / ideal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--half", choices=["tune", "test"], default="test")
    half = parser.parse_args().half
    situations = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    taxonomy, encoder = Taxonomy.load(), SentenceEncoder()
    with tempfile.TemporaryDirectory() as cache:
        index = TaxonomyIndex.open(taxonomy, encoder, Path(cache))
    tally: Counter[str] = Counter()
    for situation in situations:
        if situation["half"] == "tune":
            tally.update(grades(situation))
    popular = [value for value, _ in tally.most_common(K)]
    chosen = [situation for situation in situations if situation["half"] == half]
    hits = {s["id"]: index.search(s["text"], len(index.phrases)) for s in chosen}
    names = encoder.encode([value.name for value in taxonomy])
    definitions = encoder.encode([value.definition for value in taxonomy])

    def by_cosine(vectors: np.ndarray) -> Callable[[dict[str, Any]], list[str]]:
        return lambda s: [taxonomy.ids[i] for i in np.argsort(-(vectors @ encoder.encode([s["text"]])[0]), kind="stable")]

    def by_rank(keep: Callable[[Hit], bool]) -> Callable[[dict[str, Any]], list[str]]:
        return lambda s: [v.value for v in rank([h for h in hits[s["id"]] if keep(h)][:CANDIDATES], taxonomy.ids)]

    selectors: dict[str, Callable[[dict[str, Any]], list[str]]] = {
        "the six most popular, always": lambda s: popular,
        "cosine to the name": by_cosine(names),
        "cosine to the definition": by_cosine(definitions),
        "facets only": by_rank(lambda h: h.phrase.kind != "concern"),
        "facets and concerns (default)": by_rank(lambda h: True),
        f"default, look-alikes above {LOOK_ALIKE} hidden": by_rank(lambda h: h.phrase.kind != "concern" or h.score <= LOOK_ALIKE),
    }
    table = Table(title=f"Selection on the {half} half ({len(chosen)} situations)")
    for column in ("selector", f"nDCG@{K}", "recall of central values", "recall of central values not popular"):
        table.add_column(column, justify="left" if column == "selector" else "right")
    for name, select in selectors.items():
        orders = [select(s) for s in chosen]
        central = [(value, order[:K]) for s, order in zip(chosen, orders, strict=True) for value in s["central"]]
        rare = [(value, order) for value, order in central if value not in popular]
        table.add_row(
            name,
            f"{np.mean([ndcg(order, grades(s)) for s, order in zip(chosen, orders, strict=True)]):.3f}",
            f"{np.mean([value in order for value, order in central]):.3f}",
            f"{np.mean([value in order for value, order in rare]):.3f}",
        )
    console = Console()
    console.print(table)
    started = time.perf_counter()
    for situation in chosen:
        rank(index.search(situation["text"], CANDIDATES), taxonomy.ids)
    console.print(f"Selection takes {(time.perf_counter() - started) / len(chosen) * 1000:.1f} ms a query, warm.")
    console.print(f"Popular on the tuning half: {', '.join(popular)}.")


if __name__ == "__main__":
    main()
