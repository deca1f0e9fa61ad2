"""How well the values at stake are found, on labelled situations apart from the bank of concerns.

python -m benchmarks.selection           # the test half
python -m benchmarks.selection --half tune
python -m benchmarks.selection --selector nli:<model> --selector cross-encoder:<model>     # rows for models that you have
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from vispa_graph.resources import Resources
from vispa_graph.settings import Settings
from vispa_graph.taxonomy_index import Hit
from vispa_graph.taxonomy_index.encoder import Floats
from vispa_graph.taxonomy_index.index import OWN
from vispa_graph.taxonomy_index.selection import CANDIDATES, Selected, choose, vote

DATA = Path(__file__).parent / "data"
LOOK_ALIKE = 0.6
K = 6
Situation = dict[str, Any]
Order = Callable[[Situation], list[str]]


def labelled_situations(half: str) -> list[Situation]:
    situations = yaml.safe_load((DATA / "labelled_situations.yaml").read_text(encoding="utf-8"))
    return [situation for situation in situations if situation["half"] == half]


def plain_questions(half: str) -> list[str]:
    """Questions that put no value at stake."""
    return [str(text) for text in yaml.safe_load((DATA / "plain_questions.yaml").read_text(encoding="utf-8"))[half]]


def grades(situation: Situation) -> dict[str, int]:
    return dict.fromkeys(situation["relevant"], 1) | dict.fromkeys(situation["central"], 2)


def ndcg(order: Sequence[str], grade: dict[str, int]) -> float:
    """Normalised discounted cumulative gain of the first K values; linear gains 0, 1, 2."""
    gain = sum(grade.get(value, 0) / math.log2(place + 2) for place, value in enumerate(order[:K]))
    ideal = sum(g / math.log2(place + 2) for place, g in enumerate(sorted(grade.values(), reverse=True)[:K]))
    return gain / ideal


def hide_look_alikes(hits: Sequence[Hit], cosines: Floats) -> list[Hit]:
    """The hits without every text about situations that is near the query; a value's own definition and facets stay.

    Args:
        cosines: Of all phrases to the query, [phrases], in plain MiniLM's space: texts that say the same, not those that put the same at stake.
    """
    return [hit for hit in hits if cosines[hit.row] <= LOOK_ALIKE or hit.phrase.kind in ("definition", "facet")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=["tune", "test"], default="test")
    parser.add_argument("--selector", action="append", default=[], help="Another selector to compare: nli:<model> or cross-encoder:<model>.")
    arguments = parser.parse_args()
    resources = Resources(Settings())
    index, taxonomy, encoder = resources.index, resources.taxonomy, resources.encoder
    chosen = labelled_situations(arguments.half)
    tally: Counter[str] = Counter()
    for situation in labelled_situations("tune"):
        tally.update(grades(situation))
    popular = [value for value, _ in tally.most_common(K)]
    hits = {s["id"]: index.search(s["text"], len(index.phrases)) for s in chosen}
    vectors = {s["id"]: encoder.encode([s["text"]])[0] for s in chosen}
    with Console(stderr=True).status("encoding all phrases without the adapter, which takes minutes"):
        said = encoder.encode([phrase.text for phrase in index.phrases])

    def by_cosine(texts: Sequence[str]) -> Order:
        encoded = encoder.encode(texts)
        return lambda s: [taxonomy.ids[i] for i in np.argsort(-(encoded @ vectors[s["id"]]), kind="stable")]

    def by_facets(s: Situation) -> list[str]:
        """The mean cosine of the best two of definition and facets."""
        near = {
            value: [hit.score for hit in hits[s["id"]] if hit.phrase.source == value and hit.phrase.kind in OWN - {"sentence"}][:2]
            for value in taxonomy.ids
        }
        return sorted(taxonomy.ids, key=lambda value: -sum(near[value]))

    def voted(found: Sequence[Hit]) -> list[Selected]:
        return vote(found[:CANDIDATES], index.pull, taxonomy.ids)

    def names(selected: Sequence[Selected]) -> list[str]:
        return [s.value for s in selected]

    def diverse(s: Situation) -> list[str]:
        ranked = voted(hits[s["id"]])
        return names(choose(ranked, K, diversity=0.3, likeness=index.likeness(names(ranked))))

    def by_model(selector: str) -> Order:
        found = Resources(Settings(reranker=selector), encoder=encoder, value_encoder=index.encoder, taxonomy=taxonomy)
        return lambda s: names(found.selector.rank(s["text"], hits[s["id"]][:CANDIDATES]))

    selectors: dict[str, Order] = {
        "the six most popular, always": lambda s: popular,
        "cosine to the name": by_cosine([value.name for value in taxonomy]),
        "cosine to the definition": by_cosine([value.definition for value in taxonomy]),
        "facets only": by_facets,
        "default": lambda s: names(voted(hits[s["id"]])),
        f"default, look-alikes above {LOOK_ALIKE} hidden": lambda s: names(voted(hide_look_alikes(hits[s["id"]], said @ vectors[s["id"]]))),
        "default, diversity 0.3": diverse,
    } | {selector: by_model(selector) for selector in arguments.selector}
    table = Table(title=f"Selection on the {arguments.half} half ({len(chosen)} situations)")
    for column in ("selector", f"nDCG@{K}", "recall of central values", "recall of central values not popular"):
        table.add_column(column, justify="left" if column == "selector" else "right")
    for name, order_of in selectors.items():
        orders = [order_of(s)[:K] for s in chosen]
        central = [(value, order) for s, order in zip(chosen, orders, strict=True) for value in s["central"]]
        rare = [(value, order) for value, order in central if value not in popular]
        table.add_row(
            name,
            f"{np.mean([ndcg(order, grades(s)) for s, order in zip(chosen, orders, strict=True)]):.3f}",
            f"{np.mean([value in order for value, order in central]):.3f}",
            f"{np.mean([value in order for value, order in rare]):.3f}",
        )
    console = Console()
    console.print(table)
    best = [voted(hits[s["id"]])[:K] for s in chosen]
    families = {taxonomy[s.value].family for selected in best for s in selected}
    console.print(f"Families whose values reach the first {K} somewhere: {len(families)} of {len({value.family for value in taxonomy})}.")
    console.print(f"Popular on the tuning half: {', '.join(popular)}.")
    plain = [voted(index.search(text, CANDIDATES))[:K] for text in plain_questions(arguments.half)]
    for threshold in sorted({0.05, 0.1, 0.15, 0.2, Settings().min_score}):
        heard = [sum(s.score >= threshold for s in selected) for selected in best]
        kept = [
            value in [x.value for x in selected if x.score >= threshold] for s, selected in zip(chosen, best, strict=True) for value in s["central"]
        ]
        silent = sum(all(x.score < threshold for x in selected) for selected in plain)
        console.print(
            f"min_score {threshold:g}: {silent} of {len(plain)} plain questions get no value, {heard.count(0)} of {len(chosen)} situations get none; "
            f"{np.mean(heard):.1f} values a situation, recall of central values {np.mean(kept):.3f}."
        )
    times: dict[str, list[float]] = {"encoding": [], "search": [], "the rest": []}
    for situation in chosen:
        started = time.perf_counter()
        vector = index.encoder.encode([situation["text"]])
        encoded = time.perf_counter()
        found = index.search_vector(vector, CANDIDATES)
        searched = time.perf_counter()
        voted(found)
        for step, seconds in zip(times, (encoded - started, searched - encoded, time.perf_counter() - searched), strict=True):
            times[step].append(seconds)
    steps = ", ".join(f"{step} {np.median(seconds) * 1000:.2f}" for step, seconds in times.items())
    console.print(f"Selection takes {np.median(np.sum(list(times.values()), axis=0)) * 1000:.1f} ms a query, warm (median; {steps}).")


if __name__ == "__main__":
    main()
